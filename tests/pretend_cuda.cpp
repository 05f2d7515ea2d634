// A device "cuda" without a GPU, for torch's CPU build: its memory is the host's and its kernels are the CPU's, but it
// refuses what CUDA refuses: tensors of two devices in one operation, more memory than there is, and, where torch is asked
// for deterministic kernels, operations that CUDA has no such kernel for. tests/pretend_cuda.py builds and loads it.
//
// It cannot show how CUDA's kernels round, nor how long they take.

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}

DeviceIndex device_count() { return setting("PRETEND_GPUS", 1); }

thread_local DeviceIndex current = 0;
thread_local bool inside = false;  // a kernel of ours: its copies are not the program's
std::atomic<long> waits{0};        // of the host for the device

void wait() {
  if (!inside) waits++;
}

// --- devices and streams: work is done when a call returns, so that there is nothing to wait for

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device getDevice() const override { return Device(CUDA, current); }
  Device exchangeDevice(Device to) const override {
    Device before = getDevice();
    setDevice(to);
    return before;
  }
  void setDevice(Device to) const override {
    TORCH_CHECK(to.index() < device_count(), "CUDA error: invalid device ordinal");
    uncheckedSetDevice(to);
  }
  void uncheckedSetDevice(Device to) const noexcept override {
    if (to.index() >= 0) current = to.index();
  }
  c10::Stream getStream(Device of) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(CUDA, of.index() < 0 ? current : of.index()));
  }
  c10::Stream getDefaultStream(Device of) const override { return getStream(of); }
  c10::Stream getStreamFromGlobalPool(Device of, bool) const override { return getStream(of); }
  c10::Stream getNewStream(Device of, int) const override { return getStream(of); }
  c10::Stream exchangeStream(c10::Stream to) const override { return getStream(to.device()); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
struct PretendHooks : CUDAHooksInterface {
  explicit PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex deviceCount() const override { return device_count(); }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendHooks)
}  // namespace at

namespace {

// --- memory

std::mutex blocks_mutex;
std::unordered_map<void*, size_t> blocks;
size_t held = 0, most = 0;

void release(void* block) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  if (auto found = blocks.find(block); found != blocks.end()) {
    held -= found->second;
    blocks.erase(found);
    std::free(block);
  }
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    static const size_t room = setting("PRETEND_BYTES", 1L << 40);
    std::lock_guard<std::mutex> lock(blocks_mutex);
    TORCH_CHECK_WITH(OutOfMemoryError, held + bytes <= room, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
    void* block = bytes ? std::malloc(bytes) : nullptr;
    if (block) blocks[block] = bytes;
    most = std::max(most, held += bytes);
    return {block, block, &release, Device(CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(CUDA, &memory)

// --- the few kernels that make and reshape tensors

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
using Type = std::optional<at::ScalarType>;

at::ScalarType type_of(Type given) { return given.value_or(at::typeMetaToScalarType(at::get_default_dtype())); }

Tensor empty(IntArrayRef size, Type type, std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(CUDA, current)));
  return at::detail::empty_generic(size, &memory, KEYS, type_of(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Type type, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(CUDA, current)));
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, type_of(type));
}

Tensor on_host(const Tensor& x) {  // the same memory as a tensor of the CPU
  if (!x.is_cuda()) return x;
  auto options = x.options().device(at::kCPU);
  return x.numel() ? at::from_blob(x.mutable_data_ptr(), x.sizes(), x.strides(), options) : at::empty(x.sizes(), options);
}

Tensor& copy(Tensor& to, const Tensor& from, bool) {
  if (!to.is_cuda() || !from.is_cuda()) wait();
  on_host(to).copy_(on_host(from));
  return to;
}

at::Scalar item(const Tensor& x) {
  wait();
  return at::_local_scalar_dense(on_host(x));
}

Tensor as_strided(const Tensor& x, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<at::TensorImpl>(at::TensorImpl::VIEW, c10::Storage(x.storage()), x.key_set(), x.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(offset.value_or(x.storage_offset()));
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return view;
}

Tensor reshape_alias(const Tensor& x, IntArrayRef size, IntArrayRef stride) { return as_strided(x, size, stride, {}); }

Tensor view(const Tensor& x, IntArrayRef size) {
  auto shape = at::infer_size_dv(size, x.numel());
  auto stride = at::detail::computeStride(x.sizes(), x.strides(), IntArrayRef(shape));
  TORCH_CHECK(stride, "view size is not compatible with input tensor's size and stride");
  return as_strided(x, shape, *stride, {});
}

Tensor unfold(const Tensor& x, int64_t dimension, int64_t size, int64_t step) {
  auto shape = x.sizes().vec(), stride = x.strides().vec();
  if (x.dim() == 0) return as_strided(x, {size}, {1}, {});
  int64_t at = dimension < 0 ? dimension + x.dim() : dimension;
  shape.push_back(size);
  stride.push_back(stride[at]);
  shape[at] = (shape[at] - size) / step + 1;
  stride[at] *= step;
  return as_strided(x, shape, stride, {});
}

Tensor& set_storage(Tensor& x, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_storage_offset(offset);
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return x;
}

Tensor& set_whole_storage(Tensor& x, at::Storage storage) {
  int64_t size = storage.nbytes() / x.dtype().itemsize();
  return set_storage(x, std::move(storage), 0, {size}, {1});
}

void resize_storage(const Tensor& x, int64_t bytes) {  // what was in it is lost
  c10::DeviceGuard guard(x.device());
  x.storage().set_data_ptr_noswap(memory.allocate(bytes));
  x.storage().unsafeGetStorageImpl()->set_nbytes(bytes);
}

const Tensor& resize(const Tensor& x, IntArrayRef size, std::optional<at::MemoryFormat>) {
  size_t bytes = at::detail::computeStorageNbytesContiguous(size, x.dtype().itemsize(), x.storage_offset());
  if (bytes > x.storage().nbytes()) {
    Tensor before = on_host(x).clone();
    resize_storage(x, bytes);
    if (before.numel()) std::memcpy(x.storage().mutable_data(), before.data_ptr(), before.nbytes());
  }
  x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return x;
}

Tensor copy_back(const Tensor& from, const Tensor& to) {  // what a CPU kernel wrote into an argument
  if (from.sizes() != to.sizes()) resize(to, from.sizes(), {});
  on_host(to).copy_(from);
  return to;
}

// --- everything else: the CPU's kernel on copies, after CUDA's refusals

const std::set<std::string> UNORDERED = {"aten::cumsum", "aten::cumsum_", "aten::histc", "aten::put_"};
const std::set<std::string> SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                                               "aten::unique_consecutive", "aten::equal", "aten::repeat_interleave"};

void refuse(const std::string& name, const std::vector<Tensor>& given) {
  std::optional<Device> device;
  for (const Tensor& x : given) {
    if (!x.defined() || (!x.is_cuda() && x.dim() == 0)) continue;  // a number of the host's may go along
    if (device && x.device() != *device || !x.is_cuda())
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found ", x.device(), " beside cuda, in ", name);
    device = x.device();
  }
  bool floats = !given.empty() && given[0].defined() && at::isFloatingType(given[0].scalar_type());
  if (floats && UNORDERED.count(name)) at::globalContext().alertNotDeterministic(name);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  std::vector<Tensor> given;  // but for indices, a list of optional ones: they may lie on the host, and are copied
  bool masked = false;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) given.push_back(value.toTensor());
    else if (value.isTensorList()) for (const Tensor& x : value.toTensorVector()) given.push_back(x);
    else if (value.isOptionalTensorList())
      for (const auto& x : value.toOptionalTensorVector()) masked |= x && (x->scalar_type() == at::kBool || !x->is_cuda());
  }
  refuse(name, given);
  if (masked || SIZED_BY_VALUES.count(name)) wait();
  bool before = inside;
  inside = true;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    inside = before;
    throw;
  }
  inside = before;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("_local_scalar_dense", &item);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("unfold", &unfold);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("resize_", &resize);
  m.impl("_copy_from_and_resize", &copy_back);
}
TORCH_LIBRARY(pretend, m) {
  m.def("on_host(Tensor(a) x) -> Tensor(a)");
  m.def("resize_storage(Tensor x, int bytes) -> ()");
}
TORCH_LIBRARY_IMPL(pretend, CUDA, m) {
  m.impl("on_host", &on_host);
  m.impl("resize_storage", &resize_storage);
}

}  // namespace

extern "C" {
int pretend_current() { return current; }
void pretend_use(int device) { current = device; }
long pretend_waits() { return waits; }
long pretend_peak() { return most; }
}
