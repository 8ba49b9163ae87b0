#include "reducerd/options.h"

#include <getopt.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "collective/settings.h"
#include "transport/address.h"

namespace reducer::reducerd {
namespace {

constexpr int kThreadsDefaultMax = 4;
constexpr int kThreadsMax = 256;

// Options without a letter.
enum : int { kTlsCert = 256, kTlsKey, kTlsCa, kTokenFile, kAdminTokenFile };

std::string fromEnvironment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? std::string() : value;
}

Status wrong(const std::string& option, const std::string& why) {
  return Status(Code::kInvalidArgument, option + ": " + why);
}

bool parseNumber(std::string_view text, int least, int most, int* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && *value >= least &&
         *value <= most;
}

std::size_t physicalMemory() {
  return static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<std::size_t>(sysconf(_SC_PAGE_SIZE));
}

}  // namespace

std::string readableSize(std::size_t nbytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(nbytes);
  std::size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(units); ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return text;
}

std::string helpText() {
  return "Usage: reducer-server [--listen HOST:PORT] [--threads N] [--memory-limit SIZE] [--grace "
         "SECONDS]\n"
         "                      [--congestion-control NAME] [--transport auto|grpc] [--tls-cert "
         "FILE --tls-key FILE]\n"
         "                      [--tls-ca FILE] [--token-file FILE] [--admin-token-file FILE]\n"
         "\n"
         "A reduction server: sums what the workers of training jobs push and returns the sums.\n"
         "\n"
         "  --listen HOST:PORT   where to serve; port 0 picks a free one (default 0.0.0.0:7000)\n"
         "  --threads N          threads that move and sum data, 1 to 256 (default: cores, at most "
         "4)\n"
         "  --memory-limit SIZE  most memory promised to groups, as in 512MiB or 4GiB (default: "
         "half of this host's);\n"
         "                       a group of n workers needs n x (2 x window + 128 KiB), by default "
         "about 2 "
         "MiB each\n"
         "  --grace SECONDS      after SIGTERM, how long groups at work may finish (default 30)\n"
         "  --congestion-control NAME\n"
         "                       of its TCP connections: auto (reno where the kernel permits it), "
         "system, or a name\n"
         "                       that the kernel has, as bbr (default auto)\n"
         "  --transport NAME     what workers' data may come by: auto (tcp and gRPC, on one port) "
         "or "
         "grpc (default auto)\n"
         "  --tls-cert FILE      certificate to show (PEM), with --tls-key its key: all "
         "connections "
         "are TLS then, by gRPC\n"
         "  --tls-ca FILE        authorities (PEM): whoever connects has to show a certificate of "
         "one of them\n"
         "  --token-file FILE    tokens, one a line: whoever connects has to have one of them\n"
         "  --admin-token-file FILE\n"
         "                       operators' tokens, one a line: only who has one of them may Drain "
         "it and see all\n"
         "                       groups, and a job's token shows its own (without it, Drain is "
         "refused where\n"
         "                       --token-file has several)\n"
         "                       (environment: REDUCER_TLS_CERT, _KEY, _CA, REDUCER_TOKEN_FILE, "
         "REDUCER_ADMIN_TOKEN_FILE;\n"
         "                       the files are read again when they change)\n"
         "  --stats HOST:PORT    ask a running reducer for its counters, print them as JSON, and "
         "end; --token-file\n"
         "                       names a file with a job's token, or an operator's\n"
         "  --version, --help\n"
         "\n"
         "Prints one line when ready. SIGTERM or SIGINT: takes in no new group, ends when the last "
         "worker has\n"
         "left or the grace is over; a second signal ends at once.\n";
}

Result<Options> parseOptions(int argc, char** argv) {
  Options options;
  options.threads =
      std::clamp<int>(static_cast<int>(std::thread::hardware_concurrency()), 1, kThreadsDefaultMax);
  options.memory_limit_bytes = physicalMemory() / 2;
  options.tls = {fromEnvironment("REDUCER_TLS_CERT"), fromEnvironment("REDUCER_TLS_KEY"),
                 fromEnvironment("REDUCER_TLS_CA")};
  options.token_file = fromEnvironment("REDUCER_TOKEN_FILE");
  options.admin_token_file = fromEnvironment("REDUCER_ADMIN_TOKEN_FILE");
  bool names_operators = false;
  const option known[] = {{"listen", required_argument, nullptr, 'l'},
                          {"threads", required_argument, nullptr, 't'},
                          {"memory-limit", required_argument, nullptr, 'm'},
                          {"grace", required_argument, nullptr, 'g'},
                          {"congestion-control", required_argument, nullptr, 'c'},
                          {"transport", required_argument, nullptr, 'n'},
                          {"tls-cert", required_argument, nullptr, kTlsCert},
                          {"tls-key", required_argument, nullptr, kTlsKey},
                          {"tls-ca", required_argument, nullptr, kTlsCa},
                          {"token-file", required_argument, nullptr, kTokenFile},
                          {"admin-token-file", required_argument, nullptr, kAdminTokenFile},
                          {"stats", required_argument, nullptr, 's'},
                          {"help", no_argument, nullptr, 'h'},
                          {"version", no_argument, nullptr, 'v'},
                          {nullptr, 0, nullptr, 0}};
  opterr = 0;
  optind = 1;
  int number = 0;
  for (int c = 0; (c = getopt_long(argc, argv, "h", known, nullptr)) != -1;) {
    switch (c) {
      case 'l':
        options.listen = optarg;
        if (!transport::parseAddress(options.listen)) {
          return wrong("--listen",
                       "'" + options.listen + "' is not HOST:PORT with a port from 0 to 65535");
        }
        break;
      case 't':
        if (!parseNumber(optarg, 1, kThreadsMax, &options.threads)) {
          return wrong("--threads", "'" + std::string(optarg) + "' is not a number from 1 to 256");
        }
        break;
      case 'm': {
        auto size = collective::parseSize(optarg);
        if (!size.ok()) return wrong("--memory-limit", size.status().message());
        options.memory_limit_bytes = size.value();
        break;
      }
      case 'g':
        if (!parseNumber(optarg, 0, 86400, &number)) {
          return wrong("--grace",
                       "'" + std::string(optarg) + "' is not a number of seconds from 0 to 86400");
        }
        options.grace = std::chrono::seconds(number);
        break;
      case 'c':
        options.congestion_control = optarg;
        break;
      case 'n':
        if (const std::string name = optarg; name == "auto" || name == "grpc") {
          options.network = name == "grpc" ? transport::Network::kGrpc : transport::Network::kAuto;
          break;
        }
        return wrong("--transport", "'" + std::string(optarg) + "' is not among auto, grpc");
      case kTlsCert:
        options.tls.cert = optarg;
        break;
      case kTlsKey:
        options.tls.key = optarg;
        break;
      case kTlsCa:
        options.tls.ca = optarg;
        break;
      case kTokenFile:
        options.token_file = optarg;
        break;
      case kAdminTokenFile:
        options.admin_token_file = optarg;
        names_operators = true;
        break;
      case 's':
        options.stats_of = optarg;
        break;
      case 'h':
        options.help = true;
        break;
      case 'v':
        options.version = true;
        break;
      default:
        return wrong(argv[optind - 1], "unknown option, or its value is missing; see --help");
    }
  }
  if (names_operators && !options.stats_of.empty()) {
    return wrong("--admin-token-file", "is for serving; --stats takes such a file by --token-file");
  }
  if (optind < argc) return wrong(argv[optind], "unexpected; see --help");
  return options;
}

}  // namespace reducer::reducerd
