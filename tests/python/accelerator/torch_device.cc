// The fake accelerator as torch sees it: the device type PrivateUse1, with the generic interfaces
// for streams, events, allocators and pinned memory that any accelerator gives torch.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_conj.h>
#include <ATen/ops/_neg_view.h>
#include <ATen/ops/add.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <utility>

#include "device.h"

namespace fake {
namespace {

using c10::DeviceIndex;
constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

// ------------------------------------------------------------------ devices and streams

thread_local DeviceIndex current_device = 0;
thread_local std::array<int, kDevices> current_streams = {};

DeviceIndex checked(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < kDevices, "there is no device fake:", static_cast<int>(index));
  return index;
}
DeviceIndex indexOf(c10::Device device) {
  return device.has_index() ? checked(device.index()) : current_device;
}

c10::Stream asTorch(const Stream& stream) {
  return c10::Stream(c10::Stream::UNSAFE,
                     c10::Device(kType, static_cast<DeviceIndex>(stream.device())), stream.id());
}
Stream& asFake(const c10::Stream& stream) {
  return fake::stream(stream.device_index(), static_cast<int>(stream.id()));
}
Stream& currentStream(DeviceIndex device) {
  return fake::stream(device, current_streams.at(device));
}

struct Event {
  MarkPtr mark;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return {kType, current_device}; }
  void setDevice(c10::Device device) const override { current_device = checked(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    fake::synchronizeDevice(checked(device));
  }

  c10::Stream getStream(c10::Device device) const override {
    return asTorch(currentStream(indexOf(device)));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return asTorch(fake::stream(indexOf(device), 0));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*high*/) const override {
    return asTorch(poolStream(indexOf(device)));
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/) const override {
    return asTorch(poolStream(indexOf(device)));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams.at(stream.device_index()) = static_cast<int>(stream.id());
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override { return asFake(stream).idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { asFake(stream).synchronize(); }

  void record(void** event, const c10::Stream& stream, const DeviceIndex /*device*/,
              const c10::EventFlag /*flag*/) const override {
    if (*event == nullptr) *event = new Event;
    static_cast<Event*>(*event)->mark = asFake(stream).mark();
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) asFake(stream).waitFor(static_cast<Event*>(event)->mark);
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || static_cast<Event*>(event)->mark->reached();
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) static_cast<Event*>(event)->mark->wait();
  }
  void destroyEvent(void* event, const DeviceIndex /*device*/) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    const int device = deviceOf(data.get());
    if (device >= 0) deviceMemory(device).record(data.get(), asFake(stream));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ------------------------------------------------------------------ memory

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(std::size_t nbytes) override {
    const c10::Device device(kType, current_device);
    if (nbytes == 0) return {nullptr, device};
    void* const data =
        deviceMemory(current_device).allocate(nbytes, &currentStream(current_device));
    return {data, data, &free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* /*to*/, const void* /*from*/, std::size_t /*nbytes*/) const override {
    TORCH_CHECK(false, "fake accelerator: the host cannot copy device memory");
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t /*pool*/) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Guard().recordDataPtrOnStream(data, stream);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex /*device*/) override {
    return {};
  }
  void resetAccumulatedStats(DeviceIndex /*device*/) override {}
  void resetPeakStats(DeviceIndex device) override { deviceMemory(device).resetMax(); }

 private:
  static void free(void* data) {
    if (data != nullptr) deviceMemory(deviceOf(data)).release(data);
  }
};
DeviceAllocator& deviceAllocator() {
  static DeviceAllocator* const allocator = new DeviceAllocator;
  return *allocator;
}
REGISTER_ALLOCATOR(kType, &deviceAllocator())

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t nbytes) override {
    if (nbytes == 0) return {nullptr, c10::kCPU};
    void* const data = pinnedMemory().allocate(nbytes, nullptr);
    return {data, data, &free, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }

 private:
  static void free(void* data) {
    if (data != nullptr) pinnedMemory().release(data);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex /*device*/) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { current_device = checked(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return std::exchange(current_device, checked(device));
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  c10::Device getDeviceFromPtr(void* data) const override {
    return {kType, checked(static_cast<DeviceIndex>(deviceOf(data)))};
  }
  bool isPinnedPtr(const void* data) const override { return pinnedMemory().contains(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator* const allocator = new PinnedAllocator;
    return allocator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t nbytes) const override;
};

// ------------------------------------------------------------------ kernels

/// A tensor for a kernel: memory and its layout, and nothing that would keep the memory alive.
struct View {
  void* data = nullptr;
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
  at::ScalarType dtype = at::kFloat;
  bool conj = false;
  bool neg = false;

  static View of(const at::Tensor& tensor) {
    View view{nullptr,          tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type(),
              tensor.is_conj(), tensor.is_neg()};
    if (tensor.numel() == 0) return view;
    // const_data_ptr() of a tensor with the neg or conj bit is refused.
    const auto* const storage = static_cast<const char*>(tensor.storage().data());
    const char* const data = storage + tensor.storage_offset() * tensor.itemsize();
    if (tensor.is_cpu()) {
      view.data = const_cast<char*>(data);
    } else {
      view.data = deviceMemory(tensor.device().index())
                      .forKernel(data, at::detail::computeStorageNbytes(
                                           tensor.sizes(), tensor.strides(), tensor.itemsize()));
    }
    return view;
  }
  at::Tensor tensor() const {
    at::Tensor made = at::from_blob(data, sizes, strides, at::TensorOptions().dtype(dtype));
    if (conj) made = at::_conj(made);
    if (neg) made = at::_neg_view(made);
    return made;
  }
};

/// A View, or the number that torch makes a CPU tensor without dimensions of.
struct Operand {
  std::optional<View> view;
  at::Scalar number;

  static Operand of(const at::Tensor& tensor, c10::Device device) {
    if (tensor.is_cpu() && tensor.dim() == 0) return {std::nullopt, tensor.item()};
    TORCH_CHECK(tensor.device() == device, "fake accelerator: an operand is on the device ",
                tensor.device(), ", the result on ", device);
    return {View::of(tensor), 0};
  }
  at::Tensor tensor() const {
    if (view) return view->tensor();
    at::Tensor made = at::scalar_to_tensor(number);
    made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
  }
};

using BinaryOut = void (*)(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                           const at::Scalar& alpha);

void launchBinary(BinaryOut kernel, const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                  const at::Scalar& alpha) {
  if (out.numel() == 0) return;
  const c10::Device device = out.device();
  currentStream(device.index())
      .launch([kernel, alpha, to = View::of(out), x = Operand::of(a, device),
               y = Operand::of(b, device)] {
        at::Tensor result = to.tensor();
        kernel(result, x.tensor(), y.tensor(), alpha);
      });
}

at::Tensor binary(BinaryOut kernel, const at::Tensor& a, const at::Tensor& b,
                  const at::Scalar& alpha) {
  const at::Tensor& there = a.is_cpu() ? b : a;
  const at::Tensor out =
      at::empty(at::infer_size(a.sizes(), b.sizes()), there.options().dtype(at::result_type(a, b)));
  launchBinary(kernel, out, a, b, alpha);
  return out;
}

void addOut(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Scalar& alpha) {
  at::add_out(out, a, b, alpha);
}
void subOut(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Scalar& alpha) {
  at::sub_out(out, a, b, alpha);
}
void mulOut(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Scalar&) {
  at::mul_out(out, a, b);
}

template <BinaryOut kernel>
at::Tensor binaryAlpha(const at::Tensor& a, const at::Tensor& b, const at::Scalar& alpha) {
  return binary(kernel, a, b, alpha);
}
template <BinaryOut kernel>
at::Tensor& binaryAlphaInPlace(at::Tensor& a, const at::Tensor& b, const at::Scalar& alpha) {
  launchBinary(kernel, a, a, b, alpha);
  return a;
}
at::Tensor mul(const at::Tensor& a, const at::Tensor& b) { return binary(&mulOut, a, b, 1); }
at::Tensor& mulInPlace(at::Tensor& a, const at::Tensor& b) {
  launchBinary(&mulOut, a, a, b, 1);
  return a;
}

at::Tensor& fill(at::Tensor& tensor, const at::Scalar& value) {
  if (tensor.numel() == 0) return tensor;
  currentStream(tensor.device().index()).launch([to = View::of(tensor), value] {
    to.tensor().fill_(value);
  });
  return tensor;
}
at::Tensor& zero(at::Tensor& tensor) { return fill(tensor, 0); }

// ------------------------------------------------------------------ copies

/// Between devices: on the source's stream, which the destination's waits for, and before that the
/// other way round.
void copyOnDevice(const at::Tensor& from, const at::Tensor& to) {
  Stream& stream = currentStream(from.device().index());
  Stream& other = currentStream(to.device().index());
  if (&other != &stream) stream.waitFor(other.mark());
  stream.launch([a = View::of(from), b = View::of(to)] { b.tensor().copy_(a.tensor()); });
  if (&other != &stream) other.waitFor(stream.mark());
}

/// With pageable memory the host waits, whatever it asked for, as with a real accelerator.
void copyToOrFromHost(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool upload = from.is_cpu();
  const at::Tensor& host = upload ? from : to;
  Stream& stream = currentStream((upload ? to : from).device().index());
  const View a = View::of(from);
  const View b = View::of(to);
  const void* const host_data = (upload ? a : b).data;
  Copy copy;
  copy.upload = upload;
  copy.pinned = pinnedMemory().contains(host_data);
  copy.nbytes = host.nbytes();
  copy.stream = stream.id();
  if (copy.pinned) pinnedMemory().record(host_data, stream);
  stream.launch([copy, a, b] { runCopy(copy, [&] { b.tensor().copy_(a.tensor()); }); });
  if (!copy.pinned || !non_blocking) stream.synchronize();
}

at::Tensor copyFrom(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (to.numel() == 0) return to;
  if (from.is_cpu() || to.is_cpu()) {
    copyToOrFromHost(from, to, non_blocking);
  } else {
    copyOnDevice(from, to);
  }
  return to;
}

at::Scalar localScalar(const at::Tensor& tensor) {
  const at::Tensor host = at::empty({}, at::TensorOptions().dtype(tensor.scalar_type()));
  copyToOrFromHost(tensor.reshape({}), host, false);
  return host.item();
}

void recordStream(at::Tensor& tensor, c10::Stream stream) {
  Guard().recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
}

// ------------------------------------------------------------------ tensors

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout> /*layout*/, std::optional<c10::Device> device,
                 std::optional<bool> /*pin*/, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::Device(kType, indexOf(device.value_or(c10::Device(kType)))));
  return at::detail::empty_generic(sizes, &deviceAllocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   at::dtype_or_default(dtype), format);
}

at::Tensor emptyStrided(at::IntArrayRef sizes, at::IntArrayRef strides,
                        std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
                        std::optional<c10::Device> device, std::optional<bool> /*pin*/) {
  const c10::DeviceGuard guard(c10::Device(kType, indexOf(device.value_or(c10::Device(kType)))));
  return at::detail::empty_strided_generic(sizes, strides, &deviceAllocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           at::dtype_or_default(dtype));
}

void Hooks::resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t nbytes) const {
  const c10::DeviceGuard guard(storage.device());
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(storage.device());
  const auto kept = static_cast<std::int64_t>(std::min(nbytes, storage.nbytes()));
  const at::Tensor grown = at::empty({static_cast<std::int64_t>(nbytes)}, bytes);
  if (kept > 0) {
    const at::Tensor old = at::empty({0}, bytes).set_(storage, 0, {kept}, {1});
    copyOnDevice(old, grown.narrow(0, 0, kept));
  }
  // The other storage takes the old memory along.
  c10::StorageImpl* const mine = storage.unsafeGetStorageImpl();
  c10::StorageImpl* const other = grown.storage().unsafeGetStorageImpl();
  c10::DataPtr before = mine->set_data_ptr(std::move(other->_mutable_data_ptr_no_checks()));
  other->set_data_ptr_noswap(std::move(before));
  mine->set_nbytes(nbytes);
}

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> /*format*/) {
  const std::size_t nbytes = at::detail::computeStorageNbytesContiguous(
      sizes, tensor.itemsize(), static_cast<std::size_t>(tensor.storage_offset()));
  if (nbytes > tensor.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), nbytes);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

at::Tensor& setStorage(at::Tensor& tensor, at::Storage storage, std::int64_t offset,
                       at::IntArrayRef sizes, at::IntArrayRef strides) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return tensor;
}

at::Tensor copyFromAndResize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resize(to, from.sizes(), std::nullopt);
  return copyFrom(from, to, false);
}

/// What there is no kernel for: in step with the host. A view would be a copy without a word.
void onHost(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&onHost>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &emptyStrided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view",
         static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &setStorage);
  m.impl("record_stream", &recordStream);
  m.impl("_copy_from", &copyFrom);
  m.impl("_copy_from_and_resize", &copyFromAndResize);
  m.impl("_local_scalar_dense", &localScalar);
  m.impl("fill_.Scalar", &fill);
  m.impl("zero_", &zero);
  m.impl("add.Tensor", &binaryAlpha<&addOut>);
  m.impl("add_.Tensor", &binaryAlphaInPlace<&addOut>);
  m.impl("sub.Tensor", &binaryAlpha<&subOut>);
  m.impl("sub_.Tensor", &binaryAlphaInPlace<&subOut>);
  m.impl("mul.Tensor", &mul);
  m.impl("mul_.Tensor", &mulInPlace);
}

// The copy sees to these bits itself; torch's way to be rid of them is a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace fake

// ------------------------------------------------------------------ what tests call

namespace py = pybind11;

PYBIND11_MODULE(_fake_accelerator, m) {
  using namespace fake;  // NOLINT(google-build-using-namespace): the module is its interface
  using Microseconds = std::chrono::microseconds;
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  for (int device = 0; device < kDevices; ++device) deviceMemory(device);

  m.attr("device_count") = kDevices;
  m.def("set_delay", [](std::int64_t us) { setDelay(Microseconds(us)); });
  m.def("delay", [] { return delay().count(); });
  m.def("work", [](std::int64_t us) {
    currentStream(current_device).enqueue([us] { std::this_thread::sleep_for(Microseconds(us)); });
  });
  m.def("current_stream", [](DeviceIndex device) { return current_streams.at(checked(device)); });
  m.def("hold_uploads", &holdUploads);
  m.def("stop", &stopAll, WithoutGil());
  m.def("pinned_bytes", [] { return pinnedMemory().nbytes(); });
  m.def("pinned_bytes_max", [] { return pinnedMemory().nbytesMax(); });
  m.def("reset_pinned_bytes_max", [] { pinnedMemory().resetMax(); });
  m.def("device_bytes", [](int device) { return deviceMemory(checked(device)).nbytes(); });
  m.def("take_copies", [] {
    py::list all;
    const auto seconds = [](auto time) {
      return std::chrono::duration<double>(time.time_since_epoch()).count();
    };
    for (const Copy& copy : takeCopies()) {
      all.append(py::make_tuple(copy.upload, copy.pinned, copy.nbytes, copy.stream,
                                seconds(copy.begin), seconds(copy.end)));
    }
    return all;
  });
  // Stops the current stream until it is reached.
  py::class_<Mark, MarkPtr>(m, "Gate")
      .def(py::init([] {
        auto gate = std::make_shared<Mark>();
        currentStream(current_device).waitFor(gate);
        return gate;
      }))
      .def("open", &Mark::reach)
      .def_property_readonly("opened", &Mark::reached);
}
