// The operators on CUDA: checks, room, launches on torch's current stream. The kernels are in csrc/cuda/*.cuh, the
// schemas in vtc/ops. Built on torch's stable ABI, so one object serves every torch from 2.10 on; it loads beside a
// torch without CUDA too, where nobody calls it.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "cuda/dpc_knn.cuh"
#include "cuda/energy.cuh"
#include "cuda/match.cuh"
#include "cuda/merge.cuh"
#include "cuda/minmax.cuh"
#include "cuda/probes.cuh"
#include "cuda/received.cuh"
#include "cuda/round.cuh"
#include "cuda/select.cuh"

// A torch without CUDA does not have it: weak, or the library would not load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using vtc_cuda::int64;
using Maybe = std::optional<Tensor>;

// Up to so many values all cosines of a batch are computed at once, by cuBLAS; as in vtc/ops/definitions.py.
constexpr int64_t TABLE = 1 << 24;

void check(const Tensor& x, const char* name, int64_t dim) {
  STD_TORCH_CHECK(x.is_cuda(), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, not ", x.dim());
  for (int64_t i = 0; i < dim; ++i)
    STD_TORCH_CHECK(x.size(i) < (int64_t(1) << 31) - 4096, name, " has ", x.size(i), " in dimension ", i, ": too many");
}

void check_values(const Tensor& x, const char* name, int64_t dim) {
  check(x, name, dim);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
                  " must be float32, float16 or bfloat16");
}

// x [rows, columns] of one type on the device of `like`, contiguous.
Tensor table_of(const Tensor& x, const char* name, ScalarType type, int64_t rows, int64_t columns, const Tensor& like) {
  check(x, name, 2);
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has the wrong type: long for indices, bool for masks, else float32");
  STD_TORCH_CHECK(x.size(0) == rows && (columns < 0 || x.size(1) == columns), name, " is [", x.size(0), ", ", x.size(1),
                  "]; expected [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(x.get_device_index() == like.get_device_index(), name, " lies on another device than the tokens");
  return torch::stable::contiguous(x);
}

Maybe table_of(const Maybe& x, const char* name, ScalarType type, int64_t rows, int64_t columns, const Tensor& like) {
  return x ? Maybe(table_of(*x, name, type, rows, columns, like)) : Maybe();
}

Tensor each_of(const Tensor& each, const Tensor& like) {
  STD_TORCH_CHECK(each.is_cuda() && each.dim() == 1 && each.size(0) == like.size(0) &&
                      each.scalar_type() == ScalarType::Long,
                  "each must be a CUDA tensor of one long per image");
  return torch::stable::contiguous(each);
}

void check_batch(int64_t images) { STD_TORCH_CHECK(images <= 65535, images, " images at once; at most 65535"); }

int at_most(int64_t most, const Tensor& x) {
  STD_TORCH_CHECK(most >= 0 && most <= x.size(1), "most=", most, " of ", x.size(1), " tokens");
  return int(most);
}

template <typename T>
T* data(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }
template <typename T>
T* data(const Maybe& x) { return x ? static_cast<T*>(x->data_ptr()) : nullptr; }
const int64* indices(const Tensor& x) { return static_cast<const int64*>(x.data_ptr()); }

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// The device of x is current, and its stream, while this lives.
struct On {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  explicit On(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* raw = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &raw) == 0, "no current CUDA stream");
    stream = static_cast<cudaStream_t>(raw);
  }
};

void launched(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "vtc::", name, " was not launched: ", cudaGetErrorString(error));
}

template <typename F>
void by_type(const Tensor& x, F call) {
  if (x.scalar_type() == ScalarType::Float) call(static_cast<float*>(nullptr));
  else if (x.scalar_type() == ScalarType::Half) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
}

// Autograd looks at operators that are called from here: these have no gradient, and `out=` would refuse one.
struct NoGrad {
  bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

// All products of unit [B, N, D] where they fit. By bmm.out, which autocast leaves alone, unlike matmul.
Maybe products(const Tensor& unit) {
  const int64_t batch = unit.size(0), n = unit.size(1);
  if (batch * n * n > TABLE || unit.size(2) == 0) return {};
  NoGrad guard;
  const Tensor values = unit.scalar_type() == ScalarType::Float ? unit : torch::stable::to(unit, ScalarType::Float);
  const Tensor table = make(unit, {batch, n, n}, ScalarType::Float);
  StableIValue stack[3] = {torch::stable::detail::from(values),
                           torch::stable::detail::from(torch::stable::transpose(values, 1, 2)),
                           torch::stable::detail::from(table)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::bmm", "out", stack, TORCH_ABI_VERSION) == 0, "aten::bmm failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor energy(Tensor unit, int64_t form, double margin, double alpha, Maybe mask) {
  check_values(unit, "unit", 3);
  check_batch(unit.size(0));
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  STD_TORCH_CHECK(form >= 0 && form < 4, "unknown energy ", form, "; choose 0 = elu, 1 = paper, 2 = gaussian, 3 = nearest");
  mask = table_of(mask, "mask", ScalarType::Bool, batch, n, unit);
  unit = torch::stable::contiguous(unit);
  const On on(unit);
  const Tensor out = make(unit, {batch, n}, ScalarType::Float);
  by_type(unit, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_energy<T>(on.stream, data<T>(unit), data<bool>(mask), data<float>(out), int(batch), int(n), int(d),
                               int(form), margin, alpha);
  });
  launched("energy");
  return out;
}

std::tuple<Tensor, Tensor> match(Tensor unit, Tensor a, Tensor b, Maybe b_valid) {
  check_values(unit, "unit", 3);
  check_batch(unit.size(0));
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  a = table_of(a, "a", ScalarType::Long, batch, -1, unit);
  b = table_of(b, "b", ScalarType::Long, batch, -1, unit);
  b_valid = table_of(b_valid, "b_valid", ScalarType::Bool, batch, b.size(1), unit);
  unit = torch::stable::contiguous(unit);
  const On on(unit);
  const Tensor best = make(unit, {batch, a.size(1)}, ScalarType::Float);
  const Tensor at = make(unit, {batch, a.size(1)}, ScalarType::Long);
  by_type(unit, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_match<T>(on.stream, data<T>(unit), indices(a), indices(b), data<bool>(b_valid), data<float>(best),
                              data<int64>(at), int(batch), int(n), int(d), int(a.size(1)), int(b.size(1)));
  });
  launched("match");
  return {best, at};
}

std::tuple<Tensor, Tensor, Tensor> top_pairs(Tensor best, Tensor at, Tensor a, Tensor b, Maybe each, int64_t most,
                                             Maybe a_valid) {
  check(best, "best", 2);
  check_batch(best.size(0));
  const int64_t batch = best.size(0), na = best.size(1);
  best = table_of(best, "best", ScalarType::Float, batch, na, best);
  at = table_of(at, "at", ScalarType::Long, batch, na, best);
  a = table_of(a, "a", ScalarType::Long, batch, na, best);
  b = table_of(b, "b", ScalarType::Long, batch, -1, best);
  a_valid = table_of(a_valid, "a_valid", ScalarType::Bool, batch, na, best);
  if (each) each = each_of(*each, best);
  const int count = at_most(most, best);
  const On on(best);
  const Tensor source = make(best, {batch, most}, ScalarType::Long), target = make(best, {batch, most}, ScalarType::Long);
  const Tensor score = make(best, {batch, most}, ScalarType::Float);
  vtc_cuda::launch_top_pairs(on.stream, data<float>(best), indices(at), indices(a), indices(b), data<bool>(a_valid),
                             each ? indices(*each) : nullptr, data<int64>(source), data<int64>(target),
                             data<float>(score), int(batch), int(na), int(b.size(1)), count);
  launched("top_pairs");
  return {source, target, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_round(Tensor metric, Maybe weight, int64_t r, int64_t prefix, int64_t form,
                                                      double margin, double alpha, bool half, bool protect) {
  check_values(metric, "metric", 3);
  check_batch(metric.size(0));
  const int64_t batch = metric.size(0), n = metric.size(1), d = metric.size(2);
  STD_TORCH_CHECK(prefix >= 0 && prefix <= n, "prefix=", prefix, " of ", n, " tokens");
  STD_TORCH_CHECK(r >= 0 && r <= (n - prefix) / 2, "r=", r, ": at most half of the ", n - prefix, " tokens behind the prefix");
  STD_TORCH_CHECK(form >= -1 && form < 4, "unknown energy ", form);
  weight = table_of(weight, "weight", ScalarType::Float, batch, n, metric);
  metric = torch::stable::contiguous(metric);
  const On on(metric);
  const Tensor floats = make(metric, {batch * vtc_cuda::round_floats(n - prefix, d)}, ScalarType::Float);
  const Tensor longs = make(metric, {batch * vtc_cuda::round_longs(n - prefix)}, ScalarType::Long);
  const Tensor group = make(metric, {batch, n}, ScalarType::Long), source = make(metric, {batch, r}, ScalarType::Long);
  const Tensor size = make(metric, {batch, n - r}, ScalarType::Float), score = make(metric, {batch, r}, ScalarType::Float);
  by_type(metric, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_round<T>(on.stream, data<T>(metric), data<float>(weight), data<float>(floats), data<int64>(longs),
                              data<int64>(group), data<float>(size), data<int64>(source), data<float>(score), int(batch),
                              int(n), int(d), int(r), int(prefix), int(form), margin, alpha, half, protect);
  });
  launched("pair_round");
  return {group, size, source, score};
}

Tensor rows(Tensor x, Tensor at) {
  check_values(x, "x", 3);
  check_batch(x.size(0));
  const int64_t batch = x.size(0), n = x.size(1), c = x.size(2), m = at.dim() == 2 ? at.size(1) : 0;
  at = table_of(at, "at", ScalarType::Long, batch, m, x);
  x = torch::stable::contiguous(x);
  const On on(x);
  const Tensor out = make(x, {batch, m, c}, x.scalar_type());
  by_type(x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_rows<T>(on.stream, data<T>(x), indices(at), data<T>(out), int(batch), int(n), int(c), int(m));
  });
  launched("rows");
  return out;
}

Tensor merge(Tensor x, Tensor group, int64_t slots, Maybe weight) {
  check_values(x, "x", 3);
  check_batch(x.size(0));
  const int64_t batch = x.size(0), n = x.size(1), c = x.size(2);
  STD_TORCH_CHECK(slots >= 0 && slots < (int64_t(1) << 31), "slots=", slots);
  group = table_of(group, "group", ScalarType::Long, batch, n, x);
  weight = table_of(weight, "weight", ScalarType::Float, batch, n, x);
  x = torch::stable::contiguous(x);
  const On on(x);
  const Tensor out = make(x, {batch, slots, c}, x.scalar_type());
  by_type(x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_merge<T>(on.stream, data<T>(x), indices(group), data<float>(weight), data<T>(out), int(batch),
                              int(n), int(c), int(slots));
  });
  launched("merge");
  return out;
}

Tensor merge_backward(Tensor grad, Tensor group, Maybe weight, int64_t slots) {
  check_values(grad, "grad", 3);
  check_batch(grad.size(0));
  check(group, "group", 2);
  const int64_t batch = grad.size(0), n = group.size(1), c = grad.size(2);
  STD_TORCH_CHECK(grad.size(1) == slots, "grad has ", grad.size(1), " slots; expected ", slots);
  group = table_of(group, "group", ScalarType::Long, batch, n, grad);
  weight = table_of(weight, "weight", ScalarType::Float, batch, n, grad);
  grad = torch::stable::contiguous(grad);
  const On on(grad);
  const Tensor out = make(grad, {batch, n, c}, grad.scalar_type());
  by_type(grad, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_merge_backward<T>(on.stream, data<T>(grad), indices(group), data<float>(weight), data<T>(out),
                                       int(batch), int(n), int(c), int(slots));
  });
  launched("merge_backward");
  return out;
}

Tensor greedy_select(Tensor unit, Maybe importance, Tensor each, int64_t most, int64_t kind, double balance,
                     int64_t step, Maybe mask) {
  check_values(unit, "unit", 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  const int picks = at_most(most, unit);
  STD_TORCH_CHECK(kind >= 0 && kind < 3, "unknown selection ", kind, "; choose 0 = mmr, 1 = sads, 2 = max_min");
  STD_TORCH_CHECK(step >= 1 && step < (int64_t(1) << 31), "step=", step, ": at least 1");
  const bool alone = kind == vtc_cuda::MAX_MIN;
  STD_TORCH_CHECK(alone || importance.has_value(), "all selections but max_min need importance");
  each = each_of(each, unit);
  mask = table_of(mask, "mask", ScalarType::Bool, batch, n, unit);
  unit = torch::stable::contiguous(unit);
  const Tensor own = alone ? energy(unit, vtc_cuda::NEAREST, 0.0, 1.0, mask)
                           : table_of(*importance, "importance", ScalarType::Float, batch, n, unit);
  const On on(unit);
  const Maybe table = picks > 1 ? products(unit) : Maybe();
  const Tensor state = make(unit, {batch * vtc_cuda::greedy_state(n)}, ScalarType::Float);
  const Tensor order = make(unit, {batch, most}, ScalarType::Long);
  by_type(unit, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_greedy<T>(on.stream, data<T>(unit), data<float>(table), data<float>(own), indices(each),
                               data<bool>(mask), data<float>(state), data<int64>(order), int(batch), int(n), int(d),
                               picks, int(kind), balance, int(step));
  });
  launched("greedy_select");
  return order;
}

Tensor dpp_select(Tensor unit, Tensor relevance, Tensor each, int64_t most, Maybe mask) {
  check_values(unit, "unit", 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  const int picks = at_most(most, unit);
  each = each_of(each, unit);
  mask = table_of(mask, "mask", ScalarType::Bool, batch, n, unit);
  relevance = table_of(relevance, "relevance", ScalarType::Float, batch, n, unit);
  unit = torch::stable::contiguous(unit);
  const On on(unit);
  const Maybe table = products(unit);
  const Tensor factor = make(unit, {batch, most, n}, ScalarType::Float);
  const Tensor left = make(unit, {batch * vtc_cuda::dpp_state(n)}, ScalarType::Float);
  const Tensor order = make(unit, {batch, most}, ScalarType::Long);
  by_type(unit, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_dpp<T>(on.stream, data<T>(unit), data<float>(table), data<float>(relevance), indices(each),
                            data<bool>(mask), data<float>(factor), data<float>(left), data<int64>(order), int(batch),
                            int(n), int(d), picks);
  });
  launched("dpp_select");
  return order;
}

std::tuple<Tensor, Tensor, Tensor> dpc_knn(Tensor x, Tensor each, int64_t most, int64_t neighbors, Maybe mask) {
  check_values(x, "x", 3);
  check_batch(x.size(0));
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2);
  const int centres = at_most(most, x);
  STD_TORCH_CHECK(neighbors >= 1, "neighbors=", neighbors, ": at least 1");
  const int64_t near = neighbors < n + 1 ? neighbors : n + 1;  // any number above n means the same
  each = each_of(each, x);
  mask = table_of(mask, "mask", ScalarType::Bool, batch, n, x);
  x = torch::stable::contiguous(x);
  const On on(x);
  const Tensor state = make(x, {batch * vtc_cuda::dpc_state(n, near)}, ScalarType::Float);
  const Tensor order = make(x, {batch, most}, ScalarType::Long), target = make(x, {batch, n}, ScalarType::Long);
  const Tensor distance = make(x, {batch, n}, ScalarType::Float);
  by_type(x, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_dpc<T>(on.stream, data<T>(x), indices(each), data<bool>(mask), data<float>(state),
                            data<int64>(order), data<int64>(target), data<float>(distance), int(batch), int(n), int(d),
                            centres, int(near));
  });
  launched("dpc_knn");
  return {order, target, distance};
}

Tensor received(Tensor query, Tensor key, double scale, Maybe mask) {
  check_values(query, "query", 4);
  check_values(key, "key", 4);
  check_batch(query.size(0));
  const int64_t batch = query.size(0), heads = query.size(1), m = query.size(2), d = query.size(3);
  const int64_t key_heads = key.size(1), n = key.size(2);
  STD_TORCH_CHECK(key.size(0) == batch && key.size(3) == d, "query and key differ in images or width");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(), "query and key differ in type");
  STD_TORCH_CHECK(key.get_device_index() == query.get_device_index(), "query and key lie on different devices");
  STD_TORCH_CHECK(key_heads > 0 && heads > 0 && heads % key_heads == 0 && heads <= 65535, heads,
                  " query heads cannot share ", key_heads, " key heads evenly");
  mask = table_of(mask, "mask", ScalarType::Bool, batch, n, key);
  query = torch::stable::contiguous(query);
  key = torch::stable::contiguous(key);
  const On on(query);
  const Tensor state = make(query, {batch * vtc_cuda::received_state(heads, m, n)}, ScalarType::Float);
  const Tensor out = make(query, {batch, n}, ScalarType::Float);
  by_type(query, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_received<T>(on.stream, data<T>(query), data<T>(key), data<bool>(mask), data<float>(state),
                                 data<float>(out), int(batch), int(heads), int(key_heads), int(m), int(n), int(d),
                                 scale);
  });
  launched("received");
  return out;
}

Tensor probe_norms(Tensor difference, double step) {
  check_values(difference, "difference", 4);
  STD_TORCH_CHECK(step > 0, "step=", step, ": above 0");
  const int64_t m = difference.size(0), batch = difference.size(1), n = difference.size(2), c = difference.size(3);
  difference = torch::stable::contiguous(difference);
  const On on(difference);
  const Tensor out = make(difference, {batch, n}, ScalarType::Float);
  by_type(difference, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    vtc_cuda::launch_probes<T>(on.stream, data<T>(difference), data<float>(out), int(m), batch * n, int(c), step);
  });
  launched("probe_norms");
  return out;
}

Tensor minmax(Tensor scores, Maybe mask, double eps, double floor) {
  check(scores, "scores", 2);
  check_batch(scores.size(0));
  const int64_t batch = scores.size(0), n = scores.size(1);
  scores = table_of(scores, "scores", ScalarType::Float, batch, n, scores);
  mask = table_of(mask, "mask", ScalarType::Bool, batch, n, scores);
  const On on(scores);
  const Tensor out = make(scores, {batch, n}, ScalarType::Float);
  vtc_cuda::launch_minmax(on.stream, data<float>(scores), data<bool>(mask), data<float>(out), int(batch), int(n), eps, floor);
  launched("minmax");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtc, CUDA, m) {
  m.impl("energy", TORCH_BOX(&energy));
  m.impl("match", TORCH_BOX(&match));
  m.impl("top_pairs", TORCH_BOX(&top_pairs));
  m.impl("pair_round", TORCH_BOX(&pair_round));
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
  m.impl("greedy_select", TORCH_BOX(&greedy_select));
  m.impl("dpp_select", TORCH_BOX(&dpp_select));
  m.impl("dpc_knn", TORCH_BOX(&dpc_knn));
  m.impl("received", TORCH_BOX(&received));
  m.impl("probe_norms", TORCH_BOX(&probe_norms));
  m.impl("minmax", TORCH_BOX(&minmax));
}
