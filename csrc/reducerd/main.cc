// The standalone reducer: neither torch nor Python.
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <memory>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "reducerd/control.h"
#include "reducerd/options.h"
#include "reducerd/query.h"
#include "runtime/runtime.h"
#include "server/server.h"
#include "server/tokens.h"
#include "transport/hosts/factory.h"

namespace reducer::reducerd {
namespace {

// More cost each group memory and help nobody.
constexpr int kShardsMax = 64;

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

/// As many connections as this process may have: each is a descriptor.
void raiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  (void)setrlimit(RLIMIT_NOFILE, &limit);
}

/// Whoever reaches it may be a worker.
bool isOpen(const Options& options) {
  const bool mutual = options.tls.on() && !options.tls.ca.empty();
  return !mutual && options.token_file.empty();
}

/// Other hosts can reach it, and it knows none of them.
void warnIfOpen(const Options& options) {
  auto addresses = transport::net::resolve(options.listen);
  if (!isOpen(options) || !addresses.ok()) return;
  const std::vector<transport::net::SocketAddress>& all = addresses.value();
  if (std::all_of(all.begin(), all.end(), transport::net::isLoopback)) return;
  std::fprintf(
      stderr,
      "reducer-server: warning: whoever reaches %s may join jobs, change their gradients "
      "and use up its memory; give it --token-file, or --tls-cert, --tls-key and --tls-ca, "
      "or listen where only your hosts are (docs/security.md)\n",
      options.listen.c_str());
}

int failed(const Status& status) {
  std::fprintf(stderr, "reducer-server: %s\n", status.message().c_str());
  return 1;
}

int serve(const Options& options) {
  const sigset_t signals = blockSignals();
  raiseDescriptorLimit();
  ControlOptions who;
  for (const auto& [path, tokens] : {std::pair(&options.token_file, &who.tokens),
                                     std::pair(&options.admin_token_file, &who.admin_tokens)}) {
    if (path->empty()) continue;
    auto opened = server::TokenFile::open(*path);
    if (!opened.ok()) return failed(opened.status());
    *tokens = std::move(opened).value();
  }
  if (Status status = transport::checkTls(options.tls, transport::TlsRole::kServer); !status.ok())
    return failed(status);
  warnIfOpen(options);
  who.reflects = isOpen(options) && !who.admin_tokens;
  const std::shared_ptr<server::TokenFile> tokens = who.tokens;
  Control control(std::move(who));
  transport::HostsOptions hosts;
  hosts.network = options.network;
  hosts.grpc.threads = options.threads;
  hosts.grpc.congestion_control = options.congestion_control;
  hosts.grpc.tls = options.tls;
  hosts.grpc.configure_server = [&](::grpc::ServerBuilder& builder) { control.configure(builder); };
  hosts.grpc.serve = [&](::grpc::ServerCompletionQueue& queue) { control.serve(queue); };
  const auto transport = transport::makeHostsTransport(std::move(hosts));
  server::ServerOptions settings;
  settings.standalone = true;
  settings.memory_limit_bytes = options.memory_limit_bytes;
  settings.shards = std::min(16 * options.threads, kShardsMax);
  settings.host = runtime::hostLabel();
  settings.tokens = tokens;
  settings.counts_unread = true;
  server::ReducerServer server(*transport, settings);
  if (Status status = server.listen(options.listen); !status.ok()) return failed(status);
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
    auto stats = queryStats(options.value());
    if (!stats.ok()) return failed(stats.status());
    std::printf("%s\n", stats.value().c_str());
    return 0;
  }
  return serve(options.value());
}

}  // namespace
}  // namespace reducer::reducerd

int main(int argc, char** argv) { return reducer::reducerd::run(argc, argv); }
