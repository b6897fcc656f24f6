// A stand-in accelerator for tests: two devices whose tensors are in the processor's memory.
//
// Kernels are the processor's, so that results are real. Everything else is an accelerator's: tensors of different
// devices do not mix, generators belong to a device, autograd runs backward in a thread per device, memory is counted
// per device and limited, and waits of the host for the device are reported together with every launched operation.
//
// `__init__.py` loads this file and reads its interface, the library `standin` and `standin_observe`, at the end.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;

constexpr DeviceType kKind = DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;

thread_local DeviceIndex current = 0;
std::atomic<bool> available{false};
std::atomic<bool> float64{true};

DeviceIndex numbered(DeviceIndex index) { return index < 0 ? current : index; }
bool on_device(const Tensor& t) { return t.defined() && t.device().type() == kKind; }

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(float64 || dtype != at::kDouble, "this device has no float64, as Apple's");
}

// --- reports to the test ---

enum Event : int { kOperation = 0, kWait = 1 };
using Observer = void (*)(const char* name, int event);
std::atomic<Observer> observer{nullptr};

void report(const char* name, Event event) {
  if (Observer call = observer.load()) call(name, event);
}

// --- memory ---

struct Count {
  std::atomic<int64_t> now{0}, most{0}, limit{INT64_MAX};

  void add(int64_t bytes, DeviceIndex index) {
    if (now + bytes > limit) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "standin out of memory. Tried to allocate ", bytes, " bytes on ",
                       (int)index, ", where ", now.load(), " of ", limit.load(), " are in use");
    }
    int64_t after = now += bytes;
    for (int64_t seen = most; after > seen && !most.compare_exchange_weak(seen, after);) {}
  }
};
std::array<Count, kDevices> counts;

struct Owned {  // what a storage of the device refers to: memory of its own, or a result of the processor's kernel
  DeviceIndex index;
  int64_t bytes;
  void* memory;
  Tensor result;

  static void release(void* context) {
    auto* owned = static_cast<Owned*>(context);
    counts[owned->index].now -= owned->bytes;
    std::free(owned->memory);
    delete owned;
  }
};

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

c10::CachingDeviceAllocator::DeviceStats stats_of(DeviceIndex index) {
  c10::CachingDeviceAllocator::DeviceStats stats;
  auto& all = stats.allocated_bytes[0];
  all.current = counts[index].now;
  all.peak = counts[index].most;
  return stats;
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    counts[current].add(bytes, current);
    void* memory = bytes ? std::aligned_alloc(64, rounded(bytes)) : nullptr;
    return {memory, new Owned{current, (int64_t)bytes, memory, {}}, &Owned::release, Device(kKind, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Owned::release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex index) override { return stats_of(index); }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex index) override { counts[index].most = counts[index].now.load(); }
};

std::mutex pinned_mutex;
std::unordered_set<const void*> pinned_blocks;

bool is_pinned(const void* memory) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  return pinned_blocks.count(memory) > 0;
}

struct PinnedMemory final : c10::Allocator {
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned_blocks.erase(memory);
    }
    std::free(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::aligned_alloc(64, rounded(bytes + 1));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned_blocks.insert(memory);
    return {memory, memory, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory& memory() {
  static Memory* one = new Memory;  // never destroyed: storages may outlive static objects
  return *one;
}

PinnedMemory& pinned_memory() {
  static PinnedMemory* one = new PinnedMemory;
  return *one;
}

// --- devices and their (single) stream ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = kKind;
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return kKind; }
  Device exchangeDevice(Device device) const override {
    Device before(kKind, current);
    current = numbered(device.index());
    return before;
  }
  Device getDevice() const override { return Device(kKind, current); }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return c10::Stream(c10::Stream::DEFAULT, stream.device()); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override { report("synchronize", kWait); }
  void synchronizeDevice(const DeviceIndex) const override { report("synchronize", kWait); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  DeviceIndex deviceCount() const noexcept override { return kDevices; }  // autograd starts a thread for each
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- generators ---

struct Chance final : c10::GeneratorImpl {
  at::Generator inner;

  Chance(DeviceIndex index, uint64_t seed)
      : GeneratorImpl(Device(kKind, index), c10::DispatchKeySet(DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "a generator of standin has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "a generator of standin has no offset"); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Chance* clone_impl() const override {
    auto* copy = new Chance(device().index(), 0);
    copy->inner = inner.clone();
    return copy;
  }
};

const at::Generator& usual_generator(DeviceIndex index) {
  static std::vector<at::Generator>* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (DeviceIndex i = 0; i < kDevices; ++i) made->push_back(at::make_generator<Chance>(i, 7 + i));
    return made;
  }();
  return (*all)[numbered(index)];
}

at::Generator inner_of(const at::Generator& generator) {
  return static_cast<Chance*>(generator.unsafeGetGeneratorImpl())->inner;
}

// --- hooks ---

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return available; }
  bool hasPrimaryContext(DeviceIndex) const override { return available; }
  DeviceIndex deviceCount() const override { return available ? kDevices : 0; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current, numbered(index)); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* memory) const override { return is_pinned(memory); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  Device getDeviceFromPtr(void*) const override { return Device(kKind, current); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return usual_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Chance>(numbered(index), c10::default_rng_seed_val);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    auto fresh = memory().allocate(bytes);
    size_t common = std::min(bytes, storage.nbytes());
    if (common) std::memcpy(fresh.get(), storage.data(), common);
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

Hooks& hooks() {
  static Hooks* one = new Hooks;
  return *one;
}

// --- the same memory as a tensor of the processor, and back ---

Tensor shaped(c10::Storage storage, DispatchKey key, const Tensor& like) {
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return t;
}

Tensor on_host(const Tensor& t) {
  c10::DataPtr borrowed(t.storage().mutable_data(), Device(DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t{}, t.storage().nbytes(), std::move(borrowed),
                       at::GetAllocator(DeviceType::CPU), true);  // results are resized where they have no size yet
  return shaped(std::move(storage), DispatchKey::CPU, t);
}

Tensor adopted(const Tensor& result, DeviceIndex index) {  // a result of the processor's kernel becomes the device's
  check_dtype(result.scalar_type());
  int64_t bytes = result.storage().nbytes();
  counts[index].add(bytes, index);
  c10::DataPtr data(result.storage().mutable_data(), new Owned{index, bytes, nullptr, result}, &Owned::release,
                    Device(kKind, index));
  c10::Storage storage(c10::Storage::use_byte_size_t{}, bytes, std::move(data), &memory(), true);
  return shaped(std::move(storage), DispatchKey::PrivateUse1, result);
}

// --- operations that launch nothing ---

using Sizes = at::IntArrayRef;

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_dtype(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(device.value_or(Device(kKind, current)));
  c10::DispatchKeySet keys(DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory(), keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(device.value_or(Device(kKind, current)));
  c10::DispatchKeySet keys(DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory(), keys, c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}

Tensor view(const Tensor& self, Sizes size) { return at::native::view(self, size); }

Tensor reshape_alias(const Tensor& self, Sizes size, Sizes stride) {
  return at::cpu::as_strided(self, size, stride, self.storage_offset());
}

const Tensor& resize_(const Tensor& self, Sizes size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  size_t bytes = (self.storage_offset() + self.numel()) * self.itemsize();
  if (bytes > self.storage().nbytes()) hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, Sizes size, Sizes stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  }
  return self;
}

Tensor& set_source(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// --- operations that move values between devices ---

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  // as on CUDA: the host waits for every copy to it that is not into pinned memory, and for every blocking copy from it
  if (!on_device(to)) {
    if (on_device(self)) check_dtype(to.scalar_type());  // values are converted on the device, before they are copied
    bool async = non_blocking && is_pinned(to.storage().data());
    if (!async) report("copy to the host", kWait);
  } else if (!on_device(self) && !non_blocking) {
    report("copy from the host", kWait);
  }
  report("aten::copy_", kOperation);
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(DispatchKey::PrivateUse1));
  (on_device(to) ? on_host(to) : to).copy_(on_device(self) ? on_host(self) : self);
  return to;
}

at::Scalar item(const Tensor& self) {
  report("item", kWait);
  return on_host(self).item();
}

// --- all others: the processor's kernels on the device's memory ---

bool starts_with(const std::string& text, const char* part) { return text.rfind(part, 0) == 0; }

template <typename Seen>
void each_tensor(const IValue& value, Seen seen) {
  if (value.isTensor()) {
    seen(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& t : value.toTensorVector()) seen(t);
  } else if (value.isOptionalTensorList()) {
    for (const auto& t : value.toOptionalTensorVector()) {
      if (t) seen(*t);
    }
  }
}

// Why the host has to wait for an operation: the size of the result, or the result itself, depends on values.
bool waits(const std::string& name, const torch::jit::Stack& stack, size_t begin) {
  static const std::unordered_set<std::string> always = {
      "aten::nonzero",     "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::bincount",    "aten::equal",         "aten::is_nonzero", "aten::_local_scalar_dense",
      "aten::histc",       "aten::unique_dim_consecutive"};
  if (always.count(name)) return true;
  if (name == "aten::repeat_interleave") {  // repeats, output_size
    return stack.size() - begin == 2 && stack[begin + 1].isNone();
  }
  if (name == "aten::_index_put_impl_") {  // a mask is turned into numbers; `index` calls nonzero for it
    bool mask = false;
    for (size_t i = begin; i < stack.size(); ++i) {
      if (stack[i].isOptionalTensorList()) {
        each_tensor(stack[i], [&](const Tensor& t) { mask |= t.scalar_type() == at::kBool; });
      }
    }
    return mask;
  }
  return false;
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(stack), name_(op.schema().name()), begin_(stack->size() - op.schema().arguments().size()) {}

  void run() {
    check_devices();
    if (waits(name_, *stack_, begin_)) report(name_.c_str(), kWait);
    report(name_.c_str(), kOperation);
    for (size_t i = begin_; i < stack_->size(); ++i) lower(i);
    op_.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack_);
    for (auto& [device, host] : lowered_) {
      if (device.sizes() != host.sizes()) take_over(device, host);  // resized by an `out` argument
    }
    for (size_t i = stack_->size() - op_.schema().returns().size(); i < stack_->size(); ++i) raise(i);
  }

 private:
  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  const std::string name_;
  const size_t begin_;
  DeviceIndex device_ = -1;
  std::vector<DeviceIndex> list_devices_;  // of the first list: results of _foreach functions stand beside its tensors
  std::vector<std::pair<Tensor, Tensor>> lowered_;

  void check_devices() {
    bool mixed = false;
    std::string seen;
    each_argument([&](const Tensor& t) {
      if (!t.defined()) return;
      seen += c10::str(" ", t.device(), t.sizes());
      if (on_device(t)) {
        mixed |= device_ >= 0 && t.device().index() != device_;
        if (device_ < 0) device_ = t.device().index();
      }
    });
    // numbers of the host go with all devices; index tensors may be the host's
    const bool indexes = starts_with(name_, "aten::index") || starts_with(name_, "aten::_index_put") ||
                         name_ == "aten::_unsafe_index";
    each_argument([&](const Tensor& t) { mixed |= t.defined() && !on_device(t) && t.dim() > 0 && !indexes; });
    const bool one_by_one = starts_with(name_, "aten::_foreach") || starts_with(name_, "aten::_fused") ||
                            starts_with(name_, "aten::_amp_foreach");
    TORCH_CHECK(one_by_one || !mixed, "Expected all tensors to be on the same device: ", name_, seen);
    for (size_t i = begin_; i < stack_->size() && device_ < 0; ++i) {
      if ((*stack_)[i].isDevice()) device_ = numbered((*stack_)[i].toDevice().index());
    }
    device_ = numbered(device_);
  }

  template <typename Seen>
  void each_argument(Seen seen) {
    for (size_t i = begin_; i < stack_->size(); ++i) each_tensor((*stack_)[i], seen);
  }

  Tensor lower(const Tensor& t) {
    if (!on_device(t)) return t;
    for (auto& [device, host] : lowered_) {
      if (device.is_same(t)) return host;
    }
    lowered_.emplace_back(t, on_host(t));
    return lowered_.back().second;
  }

  void lower(size_t place) {
    IValue& value = (*stack_)[place];
    if (value.isTensor()) {
      value = lower(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> all = value.toTensorVector();
      if (list_devices_.empty()) {
        for (const Tensor& t : all) list_devices_.push_back(on_device(t) ? t.device().index() : DeviceIndex(-1));
      }
      for (Tensor& t : all) t = lower(t);
      value = c10::List<Tensor>(all);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const auto& t : value.toOptionalTensorVector()) {
        all.push_back(t ? std::optional<Tensor>(lower(*t)) : std::nullopt);
      }
      value = all;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    } else if (value.isGenerator()) {
      const at::Generator generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kKind, "Expected a 'standin' device type for generator but found '",
                  generator.device().type(), "' in ", name_);
      value = inner_of(generator);
    } else if (value.isNone()) {
      auto type = op_.schema().arguments()[place - begin_].type()->cast<c10::OptionalType>();
      if (type && type->getElementType()->kind() == c10::TypeKind::GeneratorType) {
        value = inner_of(usual_generator(device_));
      }
    }
  }

  void take_over(const Tensor& device, const Tensor& host) {
    const bool same_memory = host.storage().data() == device.storage().data();
    Tensor fresh = adopted(same_memory ? host.clone() : host, device.device().index());
    auto* impl = device.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(fresh.storage());
    impl->set_sizes_and_strides(fresh.sizes(), fresh.strides(), fresh.storage_offset());
  }

  Tensor raise(const Tensor& t, DeviceIndex index) {
    if (!t.defined() || t.device().type() != DeviceType::CPU) return t;
    for (auto& [device, host] : lowered_) {
      if (host.is_same(t)) return device;
    }
    for (auto& [device, host] : lowered_) {  // a view
      if (t.has_storage() && t.numel() && t.storage().data() == host.storage().data()) {
        return shaped(device.storage(), DispatchKey::PrivateUse1, t);
      }
    }
    return adopted(t, index);
  }

  void raise(size_t place) {
    IValue& value = (*stack_)[place];
    if (value.isTensor()) {
      value = raise(value.toTensor(), device_);
    } else if (value.isTensorList()) {
      std::vector<Tensor> all = value.toTensorVector();
      for (size_t i = 0; i < all.size(); ++i) {
        const bool beside = i < list_devices_.size() && list_devices_[i] >= 0;
        all[i] = raise(all[i], beside ? list_devices_[i] : device_);
      }
      value = c10::List<Tensor>(all);
    }
  }
};

void on_processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// the processor's has another form than that of devices
std::tuple<Tensor, Tensor> native_dropout(const Tensor& x, double p, std::optional<bool> train) {
  if (train.has_value() && !*train) return {x.clone(), at::ones_like(x, x.options().dtype(at::kBool))};
  Tensor mask = at::empty_like(x, x.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {x * mask * (p < 1 ? 1 / (1 - p) : 0.0), mask};
}

Tensor state_of(int64_t index) { return usual_generator(index).get_state(); }
void set_state_of(int64_t index, const Tensor& state) { at::Generator(usual_generator(index)).set_state(state); }
void seed(int64_t index, int64_t value) { at::Generator(usual_generator(index)).set_current_seed(value); }

// functions on lists of tensors are one launch, as on CUDA, instead of torch's loop for devices without them
void launch_lists_at_once() {
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (starts_with(name.name, "aten::_foreach") || starts_with(name.name, "aten::_fused_adam")) {
      library->impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&on_processor>());
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_source);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  m.impl("native_dropout", native_dropout);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_processor>()); }

namespace at::autocast {
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define STANDIN_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define STANDIN_WIDE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define STANDIN_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(STANDIN_LOWER)
  AT_FORALL_FP32(STANDIN_WIDE)
  AT_FORALL_PROMOTE(STANDIN_PROMOTE)
}
}  // namespace at::autocast

TORCH_LIBRARY(standin, m) {
  m.def("register_hooks() -> ()", [] {
    at::RegisterPrivateUse1HooksInterface(&hooks());
    c10::SetAllocator(kKind, &memory());
    launch_lists_at_once();
  });
  m.def("set_available(bool value) -> ()", [](bool value) { available = value; });
  m.def("is_available() -> bool", []() -> bool { return available; });
  m.def("set_float64(bool value) -> ()", [](bool value) { float64 = value; });
  m.def("get_device() -> int", []() -> int64_t { return current; });
  m.def("set_device(int index) -> ()", [](int64_t index) { current = (DeviceIndex)index; });
  m.def("limit(int index, int bytes) -> ()", [](int64_t index, int64_t bytes) { counts[index].limit = bytes; });
  m.def("state_of(int index) -> Tensor", state_of);
  m.def("set_state_of(int index, Tensor state) -> ()", set_state_of);
  m.def("seed(int index, int value) -> ()", seed);
}

extern "C" void standin_observe(Observer call) { observer = call; }
