// The Python module `reducer._torch`.
#include <pybind11/chrono.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <optional>
#include <utility>

#include "torch/backend.h"

namespace reducer::torch_backend {
namespace {

/// Raises the exception of reducer.errors that stands for a Status.
[[noreturn]] void raise(const Status& status, const std::string& before = "") {
  const py::object error =
      py::module_::import("reducer.errors")
          .attr("from_code")(static_cast<int>(status.code()), before + status.message());
  PyErr_SetObject(py::type::of(error).ptr(), error.ptr());
  throw py::error_already_set();
}

collective::Carrier carrierOf(const std::string& name) {
  Result<collective::Carrier> parsed = collective::parseCarrier(name);
  if (!parsed.ok()) raise(parsed.status(), "REDUCER_TRANSPORT: ");
  return parsed.value();
}

/// A hold on the process' runtime that Python may drop: the threads are joined without the GIL.
class RuntimeHold {
 public:
  RuntimeHold(const std::string& bind_host, const std::string& congestion_control,
              const std::string& transport, const std::string& tls_cert, const std::string& tls_key,
              const std::string& tls_ca, const std::string& token_file,
              std::size_t recorder_entries, const std::string& recorder_dir, int recorder_signal,
              bool warns) {
    runtime::RuntimeOptions options;
    options.carrier = carrierOf(transport);
    options.bind_host = bind_host;
    options.congestion_control = congestion_control;
    options.recorder_entries = recorder_entries;
    options.dumps.folder = recorder_dir;
    options.dumps.signal = recorder_signal;
    options.dumps.tells = warns;
    options.tls = {tls_cert, tls_key, tls_ca};
    options.token_file = token_file;
    Result<std::shared_ptr<runtime::Runtime>> runtime = [&] {
      const py::gil_scoped_release without_gil;
      return runtime::Runtime::acquire(options);
    }();
    if (!runtime.ok()) raise(runtime.status());
    runtime_ = std::move(runtime).value();
  }
  ~RuntimeHold() {
    const py::gil_scoped_release without_gil;
    runtime_.reset();
  }
  RuntimeHold(const RuntimeHold&) = delete;
  RuntimeHold& operator=(const RuntimeHold&) = delete;

  std::string address() const { return runtime_->address(); }
  const std::shared_ptr<runtime::Runtime>& runtime() const { return runtime_; }

 private:
  std::shared_ptr<runtime::Runtime> runtime_;
};

py::list explain(ReducerBackend& backend, std::uint64_t nbytes) {
  py::list all;
  for (const collective::Estimate& one : backend.explain(nbytes)) {
    py::dict entry;
    entry["algorithm"] = collective::nameOf(one.way.algorithm);
    entry["chunk_bytes"] = one.way.chunk_bytes;
    entry["window_bytes"] = one.way.window_bytes;
    entry["messages_s"] = one.terms.message_s;
    entry["frames_s"] = one.terms.frame_s;
    entry["wire_s"] = one.terms.wire_s;
    entry["work_s"] = one.terms.work_s;
    entry["correction"] = one.correction;
    entry["seconds"] = one.seconds;
    entry["chosen"] = one.chosen;
    all.append(entry);
  }
  return all;
}

c10::intrusive_ptr<ReducerBackend> makeBackend(
    const RuntimeHold& hold, const py::bytes& job, const std::string& name, int rank,
    int world_size, std::vector<std::string> workers, std::vector<std::string> servers,
    std::vector<std::string> places, std::vector<std::string> hosts,
    std::vector<std::uint64_t> worker_bandwidths, std::vector<std::uint64_t> server_bandwidths,
    const std::vector<collective::SampleTuple>& samples, bool measures,
    const std::string& algorithm, const std::string& transport, std::size_t chunk_bytes,
    std::size_t window_bytes, bool checksum, bool warns, Milliseconds connect_timeout,
    Milliseconds heartbeat, bool failover, Milliseconds timeout,
    std::vector<std::uint64_t> global_ranks) {
  collective::GroupConfig config;
  config.job = job;
  config.name = name;
  config.rank = rank;
  config.world_size = world_size;
  config.workers = std::move(workers);
  config.servers = std::move(servers);
  config.host = runtime::hostLabel();
  config.recorder = hold.runtime()->recorder();
  Result<std::string> token = hold.runtime()->token();
  if (!token.ok()) raise(token.status());
  config.token = std::move(token).value();
  Result<std::vector<collective::SizeRange>> parsed = collective::parseRanges(algorithm);
  if (!parsed.ok()) raise(parsed.status(), "REDUCER_ALGORITHM: ");
  config.settings.choose(std::move(parsed).value());
  Result<std::vector<collective::Sample>> measured = collective::samplesOf(samples);
  if (!measured.ok()) raise(measured.status());
  config.settings.samples = std::move(measured).value();
  config.settings.measures = measures;
  config.places = std::move(places);
  config.hosts = std::move(hosts);
  config.worker_bandwidths = std::move(worker_bandwidths);
  config.server_bandwidths = std::move(server_bandwidths);
  config.settings.carrier = carrierOf(transport);
  config.settings.chunk_bytes = chunk_bytes;
  config.settings.window_bytes = window_bytes;
  config.settings.checksum = checksum;
  config.settings.warns = warns;
  config.settings.connect_timeout = connect_timeout;
  config.settings.heartbeat = heartbeat;
  config.settings.failover = failover;
  Result<c10::intrusive_ptr<ReducerBackend>> backend = [&] {
    const py::gil_scoped_release without_gil;
    return ReducerBackend::create(std::move(config), hold.runtime(), timeout,
                                  std::move(global_ranks));
  }();
  if (!backend.ok()) raise(backend.status());
  return std::move(backend).value();
}

void setAlgorithm(ReducerOptions& options, const std::string& name) {
  Result<std::vector<collective::SizeRange>> parsed = collective::parseRanges(name);
  if (!parsed.ok()) raise(parsed.status(), "algorithm: ");
  options.settings.choose(std::move(parsed).value());
}

bool verifyTimeout(const ReducerBackend&, const c10::intrusive_ptr<c10d::Work>& work,
                   Milliseconds timeout) {
  const auto* own = dynamic_cast<const ReducerWork*>(work.get());
  TORCH_CHECK_VALUE(own != nullptr, "this Work is not of the backend 'reducer'");
  return own->timeout() == timeout;
}

std::map<std::string, std::uint64_t> countersOf(ReducerBackend& backend) {
  const collective::GroupCounters counters = backend.counters();
  return {{"operations", counters.operations},
          {"pushed_bytes", counters.pushed_bytes},
          {"pulled_bytes", counters.pulled_bytes},
          {"outstanding_bytes_max", counters.outstanding_bytes_max},
          {"window_bytes", counters.window_bytes},
          {"owner_changes", counters.owner_changes},
          {"servers", counters.servers}};
}

}  // namespace
}  // namespace reducer::torch_backend

PYBIND11_MODULE(_torch, m) {
  using namespace reducer::torch_backend;  // NOLINT(google-build-using-namespace): the module is
                                           // its interface
  m.doc() = "torch.distributed's view of the collectives. Made for one minor version of torch.";
  py::module_::import("torch.distributed");  // the base class

  py::class_<RuntimeHold>(m, "Runtime")
      .def(py::init<const std::string&, const std::string&, const std::string&, const std::string&,
                    const std::string&, const std::string&, const std::string&, std::size_t,
                    const std::string&, int, bool>(),
           py::kw_only(), py::arg("bind_host"), py::arg("congestion_control"), py::arg("transport"),
           py::arg("tls_cert"), py::arg("tls_key"), py::arg("tls_ca"), py::arg("token_file"),
           py::arg("recorder_entries"), py::arg("recorder_dir"), py::arg("recorder_signal"),
           py::arg("warns"))
      .def_property_readonly("address", &RuntimeHold::address);

  const auto copied = [](const ReducerOptions& options) {
    return c10::make_intrusive<ReducerOptions>(options);
  };
  py::class_<ReducerOptions, c10d::Backend::Options, c10::intrusive_ptr<ReducerOptions>>(
      m, "BackendOptions")
      .def_property(
          "algorithm",
          [](const ReducerOptions& options) { return options.settings.algorithmText(); },
          &setAlgorithm)
      .def_property_readonly("servers",
                             [](const ReducerOptions& options) { return options.servers; })
      .def_property(
          "chunk_bytes", [](const ReducerOptions& o) { return o.settings.chunk_bytes; },
          [](ReducerOptions& o, std::size_t nbytes) { o.settings.chunk_bytes = nbytes; })
      .def_property(
          "window_bytes", [](const ReducerOptions& o) { return o.settings.window_bytes; },
          [](ReducerOptions& o, std::size_t nbytes) { o.settings.window_bytes = nbytes; })
      .def_property(
          "checksum", [](const ReducerOptions& o) { return o.settings.checksum; },
          [](ReducerOptions& o, bool on) { o.settings.checksum = on; })
      .def("__copy__", copied)
      .def("__deepcopy__",
           [copied](const ReducerOptions& o, const py::dict&) { return copied(o); });

  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ReducerBackend, c10d::Backend, c10::intrusive_ptr<ReducerBackend>>(m, "ReducerBackend")
      .def(py::init(&makeBackend), py::kw_only(), py::arg("runtime"), py::arg("job"),
           py::arg("name"), py::arg("rank"), py::arg("world_size"), py::arg("workers"),
           py::arg("servers"), py::arg("places"), py::arg("hosts"), py::arg("worker_bandwidths"),
           py::arg("server_bandwidths"), py::arg("samples"), py::arg("measures"),
           py::arg("algorithm"), py::arg("transport"), py::arg("chunk_bytes"),
           py::arg("window_bytes"), py::arg("checksum"), py::arg("warns"),
           py::arg("connect_timeout"), py::arg("heartbeat"), py::arg("failover"),
           py::arg("timeout"), py::arg("global_ranks"))
      .def_property_readonly("options", &ReducerBackend::getBackendOptions)
      .def_property_readonly(
          "algorithm",
          [](ReducerBackend& backend) { return reducer::collective::textOf(backend.ranges()); })
      .def_property_readonly("job",
                             [](const ReducerBackend& backend) { return py::bytes(backend.job()); })
      .def_property_readonly("workers", &ReducerBackend::workers)
      .def("counters", &countersOf)
      .def("explain", &explain, py::arg("nbytes"))
      .def(
          "measure",
          [](ReducerBackend& backend) { return reducer::collective::tuplesOf(backend.measure()); },
          without_gil)
      // torch does not bind Work::abort().
      .def(
          "abort_work",
          [](ReducerBackend&, const c10::intrusive_ptr<c10d::Work>& work) { work->abort(); },
          py::arg("work"), without_gil)
      .def("comm_split_count", &ReducerBackend::splitCount)
      // Ranks that are not in a split have nothing to do for it.
      .def(
          "perform_nocolor_split", [](ReducerBackend&, const py::object&) {}, py::arg("device"))
      .def("_add_ephemeral_timeout", &ReducerBackend::addEphemeralTimeout, py::arg("timeout"))
      .def("_verify_work_timeout", &verifyTimeout, py::arg("work"), py::arg("timeout"))
      .def("_group_start", &ReducerBackend::startCoalescing, without_gil)
      .def(
          "_group_end", [](ReducerBackend& backend) { backend.endCoalescing(); }, without_gil)
      .def("_is_initialized", [](const ReducerBackend&) { return true; })
      .def_property_readonly("uid", &ReducerBackend::getID);

  m.def("shutdown_all", &ReducerBackend::shutdownAll);
}
