#include "transport/grpc/tls.h"

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <string_view>
#include <utility>

#include "transport/address.h"
#include "transport/net/dialer.h"

namespace reducer::transport {
namespace {

using grpc::experimental::FileWatcherCertificateProvider;

constexpr unsigned kRefreshSeconds = 1;

// Each step of explain().
constexpr std::chrono::milliseconds kExplainWithin{2000};

template <auto kFree>
struct Freed {
  template <class T>
  void operator()(T* pointer) const {
    kFree(pointer);
  }
};
using Bio = std::unique_ptr<BIO, Freed<&BIO_free>>;
using Certificate = std::unique_ptr<X509, Freed<&X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freed<&EVP_PKEY_free>>;
using Context = std::unique_ptr<SSL_CTX, Freed<&SSL_CTX_free>>;
using Ssl = std::unique_ptr<SSL, Freed<&SSL_free>>;

Status wrong(std::string text) { return Status(Code::kInvalidArgument, std::move(text)); }

int noPassphrase(char*, int, int, void*) { return -1; }

Result<Bio> openFile(const std::string& what, const std::string& path) {
  errno = 0;
  Bio file(BIO_new_file(path.c_str(), "r"));
  if (file) return file;
  const int error = errno;
  ERR_clear_error();
  return wrong("the TLS " + what + " file '" + path + "' cannot be read: " + std::strerror(error));
}

std::string timeText(const ASN1_TIME* time) {
  const Bio memory(BIO_new(BIO_s_mem()));
  ASN1_TIME_print(memory.get(), time);
  char text[64];
  const int nbytes = BIO_read(memory.get(), text, sizeof text);
  return std::string(text, nbytes > 0 ? static_cast<std::size_t>(nbytes) : 0);
}

std::string nameText(const X509_NAME* name) {
  const Bio memory(BIO_new(BIO_s_mem()));
  X509_NAME_print_ex(memory.get(), name, 0, XN_FLAG_ONELINE & ~ASN1_STRFLGS_ESC_MSB);
  char text[256];
  const int nbytes = BIO_read(memory.get(), text, sizeof text);
  return nbytes > 0 ? std::string(text, static_cast<std::size_t>(nbytes)) : "no name";
}

/// The first certificate of a file.
Result<Certificate> readCertificate(const std::string& what, const std::string& path) {
  auto file = openFile(what, path);
  if (!file.ok()) return file.status();
  Certificate certificate(PEM_read_bio_X509(file.value().get(), nullptr, &noPassphrase, nullptr));
  ERR_clear_error();
  if (certificate) return certificate;
  return wrong("the TLS " + what + " file '" + path +
               "' holds no certificate in PEM (-----BEGIN CERTIFICATE-----)");
}

Result<Key> readKey(const std::string& path) {
  auto file = openFile("key", path);
  if (!file.ok()) return file.status();
  Key key(PEM_read_bio_PrivateKey(file.value().get(), nullptr, &noPassphrase, nullptr));
  ERR_clear_error();
  if (key) return key;
  return wrong("the TLS key file '" + path +
               "' holds no private key in PEM, or one with a passphrase, which nobody could type "
               "in; write it without (openssl pkey -in KEY -out KEY)");
}

Status checkTimes(const std::string& what, const std::string& path, const X509* certificate) {
  if (X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0) {
    return wrong("the TLS " + what + " '" + path + "' expired on " +
                 timeText(X509_get0_notAfter(certificate)) + "; renew it");
  }
  if (X509_cmp_current_time(X509_get0_notBefore(certificate)) > 0) {
    return wrong("the TLS " + what + " '" + path + "' is not valid before " +
                 timeText(X509_get0_notBefore(certificate)) + "; is this host's clock right?");
  }
  return {};
}

Status checkPair(const TlsFiles& files) {
  const auto certificate = readCertificate("certificate", files.cert);
  if (!certificate.ok()) return certificate.status();
  auto key = readKey(files.key);
  if (!key.ok()) return key.status();
  X509* const shown = const_cast<Result<Certificate>&>(certificate).value().get();
  const bool fits = X509_check_private_key(shown, key.value().get()) == 1;
  ERR_clear_error();
  if (!fits) {
    return wrong("the TLS key '" + files.key + "' does not belong to the certificate '" +
                 files.cert + "'; give the two that were made together");
  }
  return checkTimes("certificate", files.cert, shown);
}

}  // namespace

Status checkTls(const TlsFiles& files, TlsRole role) {
  if (!files.on()) return {};
  if (files.cert.empty() != files.key.empty()) {
    return files.key.empty()
               ? wrong("the TLS certificate '" + files.cert +
                       "' is given without its key; set REDUCER_TLS_KEY (--tls-key)")
               : wrong("the TLS key '" + files.key +
                       "' is given without its certificate; set REDUCER_TLS_CERT (--tls-cert)");
  }
  if (role != TlsRole::kClient && files.cert.empty()) {
    return wrong(
        "TLS is on and there is no certificate to show to those that connect to this process "
        "(workers serve each other); set REDUCER_TLS_CERT and REDUCER_TLS_KEY (--tls-cert, "
        "--tls-key)");
  }
  if (role != TlsRole::kServer && files.ca.empty()) {
    return wrong(
        "TLS is on and there is no authority to check the other end's certificate by; set "
        "REDUCER_TLS_CA (--tls-ca)");
  }
  if (!files.cert.empty()) {
    if (Status status = checkPair(files); !status.ok()) return status;
  }
  if (files.ca.empty()) return {};
  auto authority = readCertificate("authority", files.ca);
  if (!authority.ok()) return authority.status();
  return checkTimes("authority", files.ca, authority.value().get());
}

namespace grpc_detail {
namespace {

std::shared_ptr<FileWatcherCertificateProvider> providerOf(const TlsFiles& files) {
  return std::make_shared<FileWatcherCertificateProvider>(files.key, files.cert, files.ca,
                                                          kRefreshSeconds);
}

void watch(grpc::experimental::TlsCredentialsOptions& options, const TlsFiles& files) {
  if (!files.cert.empty()) options.watch_identity_key_cert_pairs();
  if (!files.ca.empty()) options.watch_root_certs();
}

/// Keeps the certificate that was not accepted: the handshake's end drops it.
int keepRefused(int accepted, X509_STORE_CTX* check) {
  if (accepted == 1) return 1;
  auto* const ssl =
      static_cast<SSL*>(X509_STORE_CTX_get_ex_data(check, SSL_get_ex_data_X509_STORE_CTX_idx()));
  X509* const shown = X509_STORE_CTX_get0_cert(check);
  auto* const kept = static_cast<Certificate*>(SSL_get_app_data(ssl));
  if (shown != nullptr && X509_up_ref(shown) == 1) kept->reset(shown);
  return 0;
}

/// What the peer's certificate failed by.
Status distrust(const std::string& address, const TlsFiles& files, const Certificate& shown,
                long result) {
  const std::string whose = "the certificate that " + address + " shows (" +
                            (shown ? nameText(X509_get_subject_name(shown.get())) : "none") + ")";
  switch (result) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return wrong(whose + " has expired" +
                   (shown ? ", on " + timeText(X509_get0_notAfter(shown.get())) : "") +
                   "; renew it there (files are read again, a restart is not needed)");
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return wrong(whose + " is not valid yet; are both clocks right?");
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
      return wrong(whose +
                   " is for other names; make one with this address among its subject "
                   "alternative names (IP: or DNS:)");
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
      return wrong(whose + " does not come from an authority in '" + files.ca +
                   "'; REDUCER_TLS_CA (--tls-ca) has to hold the one that signed it");
    default:
      return wrong(whose + " is not accepted: " + X509_verify_cert_error_string(result));
  }
}

/// What an alert, or the end of the connection, says of this end's certificate.
Status distrusted(const std::string& address, const TlsFiles& files) {
  if (files.cert.empty()) {
    return wrong(address +
                 " demands a certificate of whoever connects; set REDUCER_TLS_CERT and "
                 "REDUCER_TLS_KEY (--tls-cert, --tls-key)");
  }
  return wrong(address + " does not accept this end's certificate '" + files.cert +
               "': it is not from an authority that is known there (REDUCER_TLS_CA, --tls-ca), or "
               "has expired by that host's clock");
}

Status notTls(const std::string& address) {
  return wrong(address +
               " does not speak TLS, and this process connects by TLS only; start it with "
               "--tls-cert and --tls-key (a worker with REDUCER_TLS_CERT and REDUCER_TLS_KEY), or "
               "take REDUCER_TLS_* away here");
}

/// Waits for what the handshake lacks. False: not until the deadline.
bool ready(int fd, int error, TimePoint deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  pollfd polled{fd, static_cast<short>(error == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN), 0};
  return left > 0 && ::poll(&polled, 1, static_cast<int>(left)) > 0;
}

void demand(SSL* ssl, const std::string& address) {
  std::string host = peerName(address);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  X509_VERIFY_PARAM* const wanted = SSL_get0_param(ssl);
  if (X509_VERIFY_PARAM_set1_ip_asc(wanted, host.c_str()) == 1) return;
  X509_VERIFY_PARAM_set1_host(wanted, host.c_str(), host.size());
  SSL_set_tlsext_host_name(ssl, host.c_str());
}

/// Keeps what the other end begins with: one that has too many strangers says so before any TLS.
long keepBegin(BIO* bio, int operation, const char* data, std::size_t /*nbytes*/, int /*argi*/,
               long /*argl*/, int result, std::size_t* nbytes_read) {
  auto* const begin = reinterpret_cast<std::string*>(BIO_get_callback_arg(bio));
  if (operation == (BIO_CB_READ | BIO_CB_RETURN) && result > 0 &&
      begin->size() < SSL3_RT_HEADER_LENGTH) {
    begin->append(data, *nbytes_read);
  }
  return result;
}

Status crowded(const std::string& address) {
  return Status(Code::kUnavailable, address + ": " + net::kCrowded + "; try again");
}

// Beside OpenSSL's own errors.
constexpr int kTooLate = -1;

/// Runs `step` until it is done: SSL_ERROR_NONE; else what it failed by, or kTooLate.
template <class Step>
int drive(SSL* ssl, int fd, TimePoint deadline, const Step& step) {
  while (true) {
    ERR_clear_error();
    errno = 0;
    const int done = step();
    if (done > 0) return SSL_ERROR_NONE;
    const int error = SSL_get_error(ssl, done);
    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE) return error;
    if (!ready(fd, error, deadline)) return kTooLate;
  }
}

bool isAlert(int reason) { return reason >= SSL_AD_REASON_OFFSET; }

}  // namespace

std::shared_ptr<grpc::ServerCredentials> serverCredentials(const TlsFiles& files) {
  grpc::experimental::TlsServerCredentialsOptions options(providerOf(files));
  watch(options, files);
  options.set_cert_request_type(files.ca.empty()
                                    ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                    : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  return grpc::experimental::TlsServerCredentials(options);
}

std::shared_ptr<grpc::ChannelCredentials> channelCredentials(const TlsFiles& files) {
  grpc::experimental::TlsChannelCredentialsOptions options;
  options.set_certificate_provider(providerOf(files));
  watch(options, files);
  return grpc::experimental::TlsCredentials(options);
}

Status tryHandshake(net::Fd fd, const std::string& address, const TlsFiles& files,
                    Duration timeout) {
  const TimePoint deadline = Clock::now() + timeout;
  const Context context(SSL_CTX_new(TLS_client_method()));
  SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER, &keepRefused);
  SSL_CTX_set_default_passwd_cb(context.get(), &noPassphrase);
  if (SSL_CTX_load_verify_locations(context.get(), files.ca.c_str(), nullptr) != 1 ||
      (!files.cert.empty() &&
       (SSL_CTX_use_certificate_chain_file(context.get(), files.cert.c_str()) != 1 ||
        SSL_CTX_use_PrivateKey_file(context.get(), files.key.c_str(), SSL_FILETYPE_PEM) != 1))) {
    ERR_clear_error();
    Status status = checkTls(files, TlsRole::kClient);
    return status.ok() ? wrong("the TLS files are being renewed") : status;
  }
  std::string begin;
  const Ssl ssl(SSL_new(context.get()));
  Certificate refused;
  SSL_set_app_data(ssl.get(), &refused);
  demand(ssl.get(), address);
  constexpr unsigned char kProtocols[] = "\x02h2";
  SSL_set_alpn_protos(ssl.get(), kProtocols, sizeof kProtocols - 1);
  SSL_set_fd(ssl.get(), fd.get());

  BIO_set_callback_arg(SSL_get_rbio(ssl.get()), reinterpret_cast<char*>(&begin));
  BIO_set_callback_ex(SSL_get_rbio(ssl.get()), &keepBegin);

  int error = drive(ssl.get(), fd.get(), deadline, [&] { return SSL_connect(ssl.get()); });
  const bool reset = error == SSL_ERROR_SYSCALL && (errno == ECONNRESET || errno == EPIPE);
  const bool shaken = error == SSL_ERROR_NONE;
  if (shaken) {
    // By TLS 1.3 a server looks at the client's certificate when the client is done; what it sends
    // first shows that it is content.
    char byte = 0;
    error = drive(ssl.get(), fd.get(), deadline, [&] { return SSL_read(ssl.get(), &byte, 1); });
  }
  const int reason = ERR_GET_REASON(ERR_peek_error());
  ERR_clear_error();
  if (error == SSL_ERROR_NONE) return {};
  if (error == kTooLate) {
    return Status(Code::kTimeout, "the TLS handshake with " + address + " takes too long");
  }
  if (begin.starts_with(net::kBusy.substr(0, SSL3_RT_HEADER_LENGTH))) return crowded(address);
  if (shaken) return distrusted(address, files);
  // As where it had no place, and no time to say so.
  if (reset) return Status(Code::kUnavailable, address + " reset the connection; try again");
  if (const long result = SSL_get_verify_result(ssl.get()); result != X509_V_OK) {
    return distrust(address, files, refused, result);
  }
  if (error == SSL_ERROR_SSL && isAlert(reason)) {
    const int alert = reason - SSL_AD_REASON_OFFSET;
    if (alert >= SSL_AD_NO_CERTIFICATE && alert <= SSL_AD_CERTIFICATE_UNKNOWN)
      return distrusted(address, files);
    if (alert == SSL_AD_UNKNOWN_CA || alert == SSL_AD_CERTIFICATE_REQUIRED)
      return distrusted(address, files);
    return wrong(address + " refuses the TLS handshake: " +
                 (ERR_reason_error_string(ERR_PACK(ERR_LIB_SSL, 0, reason)) != nullptr
                      ? ERR_reason_error_string(ERR_PACK(ERR_LIB_SSL, 0, reason))
                      : "alert " + std::to_string(alert)));
  }
  return notTls(address);
}

Status explain(const std::string& address, const TlsFiles& files) {
  auto resolved = net::resolve(address);
  if (!resolved.ok()) return {};
  auto started = net::startConnect(resolved.value().front(), "system");
  if (!started.ok()) return {};
  net::Fd fd = std::move(started).value();
  const auto comes = [&fd](short events) {
    pollfd polled{fd.get(), events, 0};
    return ::poll(&polled, 1, static_cast<int>(kExplainWithin.count())) > 0;
  };
  if (!comes(POLLOUT) || !net::connectError(fd.get()).empty()) return {};
  if (files.on()) return tryHandshake(std::move(fd), address, files, kExplainWithin);
  char answer[net::kGreetingBytes];
  const bool told =
      ::send(fd.get(), net::kGreeting.data(), net::kGreetingBytes, MSG_NOSIGNAL) > 0 &&
      comes(POLLIN) &&
      ::recv(fd.get(), answer, sizeof answer, 0) == static_cast<ssize_t>(sizeof answer);
  if (!told) return {};
  const std::string_view word(answer, sizeof answer);
  if (word == net::kBusy) return crowded(address);
  return word == net::kTlsOnly ? net::tlsWanted(address) : Status();
}

}  // namespace grpc_detail
}  // namespace reducer::transport
