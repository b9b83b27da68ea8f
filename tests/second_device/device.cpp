// "card", a device of PyTorch's that lies in main memory. Its tensors mix with no CPU tensor but
// numbers, and no generator of the CPU fills them: as on CUDA. All it computes the CPU computes,
// on copies. Without streams, half precision of its own, or kernels that a GPU lacks.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

using at::IntArrayRef;
using at::Tensor;
template <typename T>
using Maybe = std::optional<T>;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device CARD(TYPE, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes ? bytes : 1);
    return {memory, memory, &c10::free_cpu, CARD};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} memory;
REGISTER_ALLOCATOR(TYPE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  const c10::Stream stream{c10::Stream::DEFAULT, CARD};
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return CARD; }
  c10::Device getDevice() const override { return CARD; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream given) const override { return given; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  Hooks() { at::RegisterPrivateUse1HooksInterface(this); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};
Hooks& hooks = *new Hooks();  // torch holds on to it until the end

// The same memory as a CPU tensor.
Tensor seen(const Tensor& t) {
  if (t.device() != CARD) return t;
  void* data = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  return at::from_blob(data, t.sizes(), t.strides(), t.options().device(c10::kCPU));
}

Tensor put(const Tensor& t) { return t.defined() ? t.to(CARD) : t; }

Tensor empty(IntArrayRef size, Maybe<c10::ScalarType> dtype, Maybe<c10::Layout>, Maybe<c10::Device>,
             Maybe<bool>, Maybe<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Maybe<c10::ScalarType> dtype,
                     Maybe<c10::Layout>, Maybe<c10::Device>, Maybe<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  seen(to).copy_(seen(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& t) { return seen(t).item(); }

Tensor as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, Maybe<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

Tensor view(const Tensor& t, IntArrayRef size) { return at::native::view(t, size); }

Tensor reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(t, size, stride);
}

Tensor unfold(const Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}

const Tensor& resize(const Tensor& t, IntArrayRef size, Maybe<c10::MemoryFormat> format) {
  return at::native::resize_(t, size, format);
}

Tensor& set_storage(Tensor& t, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, std::move(storage), offset, size, stride);
}

Tensor& set_whole_storage(Tensor& t, c10::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / t.dtype().itemsize());
  return set_storage(t, std::move(storage), 0, {count}, {});
}

// Attention by its formula.
int64_t sdp_choice(const Tensor&, const Tensor&, const Tensor&, const Maybe<Tensor>&, double, bool,
                   Maybe<double>, bool) {
  return 0;
}

Tensor convolution(const Tensor& x, const Tensor& w, const Maybe<Tensor>& b, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef out,
                   int64_t groups) {
  const bool biased = b && b->defined();
  TORCH_CHECK(w.device() == CARD && x.device() == CARD && (!biased || b->device() == CARD),
              "Expected all tensors to be on the same device: convolution");
  const Maybe<Tensor> bias = biased ? Maybe<Tensor>(seen(*b)) : std::nullopt;
  return put(at::convolution(seen(x), seen(w), bias, stride, padding, dilation, transposed, out, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& y, const Tensor& x, const Tensor& w, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef out, int64_t groups, std::array<bool, 3> mask) {
  const auto [dx, dw, db] =
      at::convolution_backward(seen(y), seen(x), seen(w), IntArrayRef{w.size(transposed)}, stride,
                               padding, dilation, transposed, out, groups, mask);
  return {put(dx), put(dw), put(db)};
}

struct Places {
  bool here = false, elsewhere = false;
  void look(const Tensor& t) {
    if (!t.defined()) return;
    here |= t.device() == CARD;
    elsewhere |= t.device() != CARD && t.dim();
  }
};

// Everything else: on copies, if nothing of the CPU's is among what goes in. Indices may be there.
void on_copies(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  const bool indexing = name.find("index") != std::string::npos;
  Places places;
  for (const auto& given : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (given.isTensor()) places.look(given.toTensor());
    if (given.isTensorList())
      for (const Tensor& each : given.toTensorList()) places.look(each);
    if (given.isOptionalTensorList() && !indexing)
      for (const Maybe<Tensor>& each : given.toOptionalTensorList())
        if (each) places.look(*each);
    TORCH_CHECK(!given.isGenerator() || given.toGenerator().device() == CARD,
                "Expected a generator of this device: ", name);
  }
  TORCH_CHECK(!(places.here && places.elsewhere),
              "Expected all tensors to be on the same device: ", name);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_copies>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_fused_sdp_choice", &sdp_choice);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
