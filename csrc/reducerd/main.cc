// The standalone reducer: neither torch nor Python.
#include <csignal>
#include <cstdio>
#include <ctime>
#include <memory>
#include <utility>

#include "common/limits.h"
#include "reducerd/control.h"
#include "reducerd/options.h"
#include "reducerd/query.h"
#include "runtime/runtime.h"
#include "server/server.h"
#include "transport/hosts/factory.h"

namespace reducer::reducerd {
namespace {

constexpr char kVersion[] = "0.1.0";

/// SIGTERM and SIGINT are taken by sigtimedwait() in main only: blocked before any thread starts.
sigset_t blockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

/// True if a signal came within `timeout`.
bool waitForSignal(const sigset_t& signals, std::chrono::milliseconds timeout) {
  const timespec wait{timeout.count() / 1000, timeout.count() % 1000 * 1'000'000};
  return sigtimedwait(&signals, nullptr, &wait) > 0;
}

int serve(const Options& options) {
  const sigset_t signals = blockSignals();
  Control control;
  transport::HostsOptions hosts;
  hosts.network = options.network;
  hosts.grpc.threads = options.threads;
  hosts.grpc.congestion_control = options.congestion_control;
  hosts.grpc.configure_server = [&](::grpc::ServerBuilder& builder) { control.configure(builder); };
  const auto transport = transport::makeHostsTransport(std::move(hosts));
  server::ServerOptions settings;
  settings.standalone = true;
  settings.memory_limit_bytes = options.memory_limit_bytes;
  settings.shards = 16 * options.threads;
  settings.host = runtime::hostLabel();
  server::ReducerServer server(*transport, settings);
  if (Status status = server.listen(options.listen); !status.ok()) {
    std::fprintf(stderr, "reducer-server: %s\n", status.message().c_str());
    return 1;
  }
  control.attach(server);
  std::printf("reducer ready on %s (protocol %u, threads %d, memory limit %s)\n",
              server.address().c_str(), kProtocolVersion, options.threads,
              readableSize(options.memory_limit_bytes).c_str());
  std::fflush(stdout);

  // Drain may also be asked for through the control plane.
  const auto poll = std::chrono::milliseconds(200);
  while (!waitForSignal(signals, poll)) {
    if (server.stats().draining && server.idle()) break;
  }
  control.setServing(false);
  server.drain();
  const auto deadline = Clock::now() + options.grace;
  std::printf("reducer draining: %llu connections, at most %lld s\n",
              static_cast<unsigned long long>(server.stats().connections),
              static_cast<long long>(options.grace.count()));
  std::fflush(stdout);
  while (!server.idle() && Clock::now() < deadline) {
    if (waitForSignal(signals, poll)) break;
  }
  const bool clean = server.idle();
  server.finish(std::chrono::seconds(1));
  control.detach();
  std::printf("reducer stopped%s\n", clean ? "" : " with workers still connected");
  std::fflush(stdout);
  return 0;
}

int run(int argc, char** argv) {
  auto options = parseOptions(argc, argv);
  if (!options.ok()) {
    std::fprintf(stderr, "reducer-server: %s\n", options.status().message().c_str());
    return 2;
  }
  if (options.value().help) {
    std::fputs(helpText().c_str(), stdout);
    return 0;
  }
  if (options.value().version) {
    std::printf("reducer-server %s (protocol %u)\n", kVersion, kProtocolVersion);
    return 0;
  }
  if (!options.value().stats_of.empty()) {
    auto stats = queryStats(options.value().stats_of);
    if (!stats.ok()) {
      std::fprintf(stderr, "reducer-server: %s\n", stats.status().message().c_str());
      return 1;
    }
    std::printf("%s\n", stats.value().c_str());
    return 0;
  }
  return serve(options.value());
}

}  // namespace
}  // namespace reducer::reducerd

int main(int argc, char** argv) { return reducer::reducerd::run(argc, argv); }
