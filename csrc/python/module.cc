// The Python module `reducer._core`: settings, addresses and kernels; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "collective/cost_model.h"
#include "collective/settings.h"
#include "common/limits.h"
#include "common/types.h"
#include "kernels/reduce.h"
#include "python/probes.h"
#include "python/raise.h"
#include "python/simulation.h"
#include "runtime/runtime.h"

namespace py = pybind11;

namespace reducer {
namespace {

using python::valueOf;

template <class Call>
auto withoutGil(Call call) {
  const py::gil_scoped_release without_gil;
  return call();
}

DataType dataTypeNamed(const std::string& name) {
  std::string known;
  for (int number = 1; sizeOf(static_cast<DataType>(number)) > 0; ++number) {
    const auto dtype = static_cast<DataType>(number);
    if (nameOf(dtype) == name) return dtype;
    known += (known.empty() ? "" : ", ") + std::string(nameOf(dtype));
  }
  throw py::type_error("'" + name + "' is no dtype; there are " + known);
}

ReduceOp opNamed(const std::string& name) {
  std::string known;
  for (int number = 1; nameOf(static_cast<ReduceOp>(number)) != "?"; ++number) {
    const auto op = static_cast<ReduceOp>(number);
    if (nameOf(op) == name) return op;
    known += (known.empty() ? "" : ", ") + std::string(nameOf(op));
  }
  throw py::value_error("'" + name + "' is no operation; there are " + known);
}

/// A contiguous buffer of Python's, held while this lives.
class BufferView {
 public:
  BufferView(const py::handle& object, bool writable, const std::string& name) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      PyErr_Clear();
      throw py::type_error(name + " must be a contiguous" + (writable ? ", writable" : "") +
                           " buffer");
    }
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(view_.buf); }
  std::size_t nbytes() const { return static_cast<std::size_t>(view_.len); }
  bool overlaps(const BufferView& other) const {
    return nbytes() > 0 && other.nbytes() > 0 && data() < other.data() + other.nbytes() &&
           other.data() < data() + nbytes();
  }

 private:
  Py_buffer view_{};
};

void reduce(const std::string& dtype_name, const std::string& op_name,
            const std::vector<py::object>& inputs, const py::object& out) {
  const DataType dtype = dataTypeNamed(dtype_name);
  const ReduceOp op = opNamed(op_name);
  if (!supports(op, dtype)) throw py::type_error(op_name + " has no meaning on " + dtype_name);
  if (inputs.empty()) throw py::value_error("inputs is empty; at least one buffer is needed");
  const BufferView result(out, true, "out");
  if (result.nbytes() % sizeOf(dtype) != 0) {
    throw py::value_error("out has " + std::to_string(result.nbytes()) +
                          " bytes, no whole number of " + dtype_name);
  }
  std::vector<std::unique_ptr<BufferView>> views;
  std::vector<Payload> payloads;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = "inputs[" + std::to_string(i) + "]";
    views.push_back(std::make_unique<BufferView>(inputs[i], false, name));
    const BufferView& view = *views.back();
    if (view.nbytes() != result.nbytes()) {
      throw py::value_error(name + " has " + std::to_string(view.nbytes()) + " bytes, out has " +
                            std::to_string(result.nbytes()));
    }
    if (view.overlaps(result)) throw py::value_error(name + " overlaps out");
    payloads.emplace_back(Bytes(view.data(), view.nbytes()), nullptr);
  }
  withoutGil([&] {
    kernels::reduce(dtype, op, payloads, result.data(), result.nbytes() / sizeOf(dtype));
  });
}

/// A float8 type, and the views of as many float8 as float32.
struct Float8Views {
  Float8Views(const std::string& dtype_name, const py::object& values, const py::object& out,
              bool narrows)
      : dtype(dataTypeNamed(dtype_name)), in(values, false, "values"), result(out, true, "out") {
    if (dtype != DataType::kFloat8E4M3FN && dtype != DataType::kFloat8E5M2) {
      throw py::type_error(dtype_name + " is no float8");
    }
    const std::size_t narrow = narrows ? result.nbytes() : in.nbytes();
    const std::size_t wide = narrows ? in.nbytes() : result.nbytes();
    if (wide != narrow * sizeof(float)) {
      throw py::value_error("values has " + std::to_string(in.nbytes()) + " bytes, out has " +
                            std::to_string(result.nbytes()) + "; a float32 has 4, a float8 has 1");
    }
    count = narrow;
  }

  DataType dtype;
  BufferView in;
  BufferView result;
  std::size_t count = 0;
};

void widenFloat8(const std::string& dtype, const py::object& values, const py::object& out) {
  const Float8Views views(dtype, values, out, false);
  kernels::widenFloat8(views.dtype, reinterpret_cast<const std::uint8_t*>(views.in.data()),
                       reinterpret_cast<float*>(views.result.data()), views.count);
}

void narrowFloat8(const std::string& dtype, const py::object& values, const py::object& out) {
  const Float8Views views(dtype, values, out, true);
  kernels::narrowFloat8(views.dtype, reinterpret_cast<const float*>(views.in.data()),
                        reinterpret_cast<std::uint8_t*>(views.result.data()), views.count);
}

}  // namespace
}  // namespace reducer

PYBIND11_MODULE(_core, m) {
  using namespace reducer;  // NOLINT(google-build-using-namespace): the module is its interface
  m.doc() = "The part of reducer that needs no torch: settings, addresses, kernels, simulation.";
  m.attr("version") = REDUCER_VERSION;
  m.attr("torch_version") = REDUCER_TORCH_VERSION;
  m.attr("protocol_version") = kProtocolVersion;
  m.attr("min_chunk_bytes") = kMinChunkBytes;
  m.attr("max_chunk_bytes") = kMaxChunkBytes;

  m.def(
      "parse_size", [](const std::string& text) { return valueOf(collective::parseSize(text)); },
      py::arg("text"));
  m.def(
      "parse_bandwidth",
      [](const std::string& text) { return valueOf(collective::parseBandwidth(text)); },
      py::arg("text"));
  m.def(
      "parse_servers",
      [](const std::string& text) { return valueOf(collective::parseServers(text)); },
      py::arg("text"));
  m.def(
      "parse_algorithm",
      [](const std::string& text) {
        return collective::textOf(valueOf(collective::parseRanges(text)));
      },
      py::arg("text"));

  m.def(
      "parse_transport",
      [](const std::string& text) {
        return std::string(collective::nameOf(valueOf(collective::parseCarrier(text))));
      },
      py::arg("text"));

  m.def(
      "choose_algorithms",
      [](const std::vector<collective::SampleTuple>& samples, std::uint32_t ranks,
         std::uint32_t hosts, std::uint32_t servers) {
        collective::Settings settings;
        settings.samples = valueOf(collective::samplesOf(samples));
        if (ranks < 1 || hosts < 1 || hosts > ranks || settings.samples.empty())
          throw py::value_error("at least one sample, and no more hosts than ranks");
        collective::Nics nics;
        for (std::uint32_t rank = 0; rank < ranks; ++rank)
          nics.host_of_rank.push_back(rank * hosts / ranks);
        nics.hosts.assign(hosts, 1);
        nics.servers.assign(servers, 1);
        return collective::textOf(collective::CostModel(settings, nics).ranges());
      },
      py::arg("samples"), py::arg("ranks"), py::arg("hosts"), py::arg("servers"));

  m.def(
      "recorded",
      [](const std::string& reason) {
        return withoutGil([&] { return runtime::recorded(reason); });
      },
      py::arg("reason"));
  m.def("host_label", &runtime::hostLabel);
  m.def("host_identity", &runtime::hostIdentity);
  m.def(
      "choose_bind_host",
      [](const std::string& interface, const std::string& peer_host) {
        return valueOf(withoutGil([&] { return runtime::chooseBindHost(interface, peer_host); }));
      },
      py::arg("interface"), py::arg("peer_host"));
  m.def(
      "resolve_servers",
      [](const std::vector<std::string>& servers) {
        return valueOf(withoutGil([&] { return runtime::resolveServers(servers); }));
      },
      py::arg("servers"));

  m.def("reduce", &reduce, py::arg("dtype"), py::arg("op"), py::arg("inputs"), py::arg("out"));
  m.def("widen_float8", &widenFloat8, py::arg("dtype"), py::arg("values"), py::arg("out"));
  m.def("narrow_float8", &narrowFloat8, py::arg("dtype"), py::arg("values"), py::arg("out"));
  m.def("instruction_sets", &kernels::instructionSets);
  m.def(
      "pin_instruction_set",
      [](const std::string& name) {
        if (!kernels::pinInstructionSet(name)) {
          throw py::value_error("'" + name +
                                "' is no instruction set of this machine; see instruction_sets()");
        }
      },
      py::arg("name"));

  python::addSimulation(m);
  py::class_<python::EngineProbe>(m, "EngineProbe")
      .def(py::init<int, std::size_t, std::size_t>(), py::arg("ranks"), py::arg("chunk_bytes"),
           py::arg("buffer_bytes"))
      .def("run", &python::EngineProbe::run, py::call_guard<py::gil_scoped_release>());
  py::class_<python::AddProbe>(m, "AddProbe")
      .def(py::init<std::size_t>(), py::arg("buffer_bytes"))
      .def("run", &python::AddProbe::run, py::call_guard<py::gil_scoped_release>());
}
