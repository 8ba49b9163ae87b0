// The first words on a connection, from which both ends know what it carries: frames as they are
// (transport/tcp) or HTTP/2 (gRPC). One port serves both.
//
// The end that connects speaks first. Frames as they are: it sends kGreeting, and nothing else
// until kAccepted has come back. An end that does not know the greeting takes it for bad HTTP/2 (or
// bad TLS) and closes; then gRPC can be tried. HTTP/2 begins with a text of its own (RFC
// 9113, 3.4).
#pragma once

#include <cstddef>
#include <string_view>

namespace reducer::transport::net {

inline constexpr std::size_t kGreetingBytes = 8;

/// The last byte is the version of what follows. What changes it makes a new greeting, which an
/// older end refuses; versions of the frames themselves are compared in the hello.
inline constexpr std::string_view kGreeting{"reducer\x01", kGreetingBytes};
inline constexpr std::string_view kAccepted{"REDUCER\x01", kGreetingBytes};
inline constexpr std::string_view kHttp2{"PRI * HT", kGreetingBytes};

/// Instead of kAccepted, before the connection is closed: come again later (too many have not said
/// who they are), or by TLS.
inline constexpr std::string_view kBusy{"REDBUSY\x01", kGreetingBytes};
inline constexpr std::string_view kTlsOnly{"RED-TLS\x01", kGreetingBytes};

/// How TLS begins: a handshake record of version 3.x.
inline constexpr std::string_view kTlsRecord{"\x16\x03", 2};

/// What an accepted connection carries.
enum class Speech { kFrames, kHttp2, kTls };

/// What a listener takes; all else is closed.
enum class Hearing { kFramesAndHttp2, kHttp2, kTls };

}  // namespace reducer::transport::net
