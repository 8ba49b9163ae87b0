#include "python/simulation.h"

#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "collective/settings.h"
#include "python/raise.h"
#include "simulate/simulation.h"

namespace py = pybind11;

namespace reducer::python {
namespace {

Duration durationOf(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

/// Lets Python's signal handlers run. False: one has raised, as Ctrl-C does.
bool undisturbed() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() == 0;
}

/// Runs `call` without the GIL; what a signal handler raised meanwhile goes before its result.
template <class Call>
auto interruptible(Call call) {
  auto result = [&] {
    const py::gil_scoped_release without_gil;
    return call();
  }();
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return valueOf(std::move(result));
}

std::unique_ptr<simulate::Simulation> create(std::int32_t workers, std::int32_t reducers,
                                             const std::string& algorithm, double bytes_per_second,
                                             double reducer_bytes_per_second, double latency_s,
                                             double jitter_s, std::size_t chunk_bytes,
                                             std::size_t window_bytes, std::size_t burst_bytes,
                                             int cores, bool shared_cores, double frame_s,
                                             double byte_s, std::uint64_t seed, bool check) {
  simulate::SimulationOptions options;
  options.workers = workers;
  options.reducers = reducers;
  options.settings.algorithm = valueOf(collective::parseAlgorithm(algorithm));
  options.settings.chunk_bytes = chunk_bytes;
  options.settings.window_bytes = window_bytes;
  options.nic.bytes_per_second = bytes_per_second;
  options.nic.burst_bytes = burst_bytes;
  options.reducer_bytes_per_second = reducer_bytes_per_second;
  options.latency = durationOf(latency_s);
  options.jitter = durationOf(jitter_s);
  options.processor.cores = cores;
  options.processor.shared = shared_cores;
  options.processor.per_frame = durationOf(frame_s);
  options.processor.ns_per_byte = byte_s * 1e9;
  options.seed = seed;
  options.check = check;
  return interruptible(
      [&] { return simulate::Simulation::create(std::move(options), undisturbed); });
}

py::dict measure(simulate::Simulation& simulation, std::size_t nbytes, int iterations) {
  const simulate::Measurement measurement =
      interruptible([&] { return simulation.measure(nbytes, iterations, undisturbed); });
  py::dict result;
  result["seconds"] = measurement.seconds;
  result["nic_share"] = measurement.nic.share;
  result["nic_of_reducer"] = measurement.nic.reducer;
  result["nic_receiving"] = measurement.nic.receiving;
  result["nic_bytes"] = measurement.nic_bytes;
  result["processor_share"] = measurement.processor.share;
  result["processor_of_reducer"] = measurement.processor.reducer;
  result["frames"] = measurement.frames;
  result["frames_per_second"] = measurement.frames_per_second;
  result["all_frames"] = measurement.all_frames;
  result["all_bytes"] = measurement.all_bytes;
  result["held_bytes"] = measurement.held_bytes;
  result["waiting_bytes"] = measurement.waiting_bytes;
  result["outstanding_bytes"] = measurement.outstanding_bytes;
  result["wrong"] = measurement.wrong;
  return result;
}

py::dict shape(const simulate::Simulation& simulation) {
  const simulate::Shape shape = simulation.shape();
  py::dict result;
  result["algorithm"] = std::string(collective::nameOf(shape.algorithm));
  result["window_bytes"] = shape.window_bytes;
  result["promised_bytes"] = shape.promised_bytes;
  result["worker_connections"] = shape.worker_connections;
  result["reducer_connections"] = shape.reducer_connections;
  return result;
}

}  // namespace

void addSimulation(py::module_& module) {
  py::class_<simulate::Simulation>(module, "Simulation")
      .def(py::init(&create), py::kw_only(), py::arg("workers"), py::arg("reducers"),
           py::arg("algorithm"), py::arg("bytes_per_second"), py::arg("reducer_bytes_per_second"),
           py::arg("latency_s"), py::arg("jitter_s"), py::arg("chunk_bytes"),
           py::arg("window_bytes"), py::arg("burst_bytes"), py::arg("cores"),
           py::arg("shared_cores"), py::arg("frame_s"), py::arg("byte_s"), py::arg("seed"),
           py::arg("check"))
      .def("measure", &measure, py::arg("nbytes"), py::arg("iterations"))
      .def("shape", &shape);
}

}  // namespace reducer::python
