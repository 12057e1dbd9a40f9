// The front door of the processor's kernels: checks, types, threads. Schemas: vtc/ops/kernels.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <tuple>

#define VTC_PARALLEL torch::stable::parallel_for
#include "cpu/cover.h"
#include "cpu/energy.h"
#include "cpu/knn.h"
#include "cpu/match.h"
#include "cpu/merge.h"
#include "cpu/minmax.h"
#include "cpu/probes.h"
#include "cpu/received.h"
#include "cpu/round.h"
#include "cpu/select.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

Tensor ready(const Tensor& t, const char* name, ScalarType type, int64_t dims) {
  STD_TORCH_CHECK(t.is_cpu(), name, " lies on another device than the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong type: float32, int64 or bool, as the schema says");
  STD_TORCH_CHECK(t.dim() == dims, name, " is ", shape(t), ", but takes ", dims, " dimensions");
  return torch::stable::contiguous(t);
}

void same(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.size(0) == rows && t.size(1) == columns, name, " is ", shape(t), ", but should be [", rows, ", ", columns, "]");
}

Maybe mask_of(const Maybe& mask, const char* name, int64_t rows, int64_t columns) {
  if (!mask.has_value()) return std::nullopt;
  Tensor m = ready(*mask, name, ScalarType::Bool, 2);
  same(m, name, rows, columns);
  return m;
}

const bool* row(const Maybe& mask, int64_t b, int64_t columns) {
  return mask.has_value() ? static_cast<const bool*>(mask->data_ptr()) + b * columns : nullptr;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Tensor energy(Tensor unit, int64_t form, double margin, double alpha, Maybe mask) {
  unit = ready(unit, "unit", ScalarType::Float, 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  mask = mask_of(mask, "mask", batch, n);
  Tensor out = torch::stable::new_empty(unit, {batch, n});
  STD_TORCH_CHECK(form >= 0 && form < 4, "unknown energy ", form, "; choose 0 = elu, 1 = paper, 2 = gaussian, 3 = nearest");
  const vtc::Form kind = vtc::Form(form);
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)  // in a thread of its own, an image takes no others
      vtc::energy(data<float>(unit) + b * n * d, n, d, row(mask, b, n), kind, margin, float(alpha),
                  data<float>(out) + b * n);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return out;
}

void check_tokens(const Tensor& index, const char* name, int64_t n) {
  for (int64_t i = 0; i < index.numel(); ++i) {
    const int64_t at = data<int64_t>(index)[i];
    STD_TORCH_CHECK(at >= 0 && at < n, name, " holds ", at, ", but there are ", n, " tokens");
  }
}

std::tuple<Tensor, Tensor> match(Tensor unit, Tensor a, Tensor b, Maybe b_valid) {
  unit = ready(unit, "unit", ScalarType::Float, 3);
  a = ready(a, "a", ScalarType::Long, 2);
  b = ready(b, "b", ScalarType::Long, 2);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2), sources = a.size(1), targets = b.size(1);
  same(a, "a", batch, sources);
  same(b, "b", batch, targets);
  check_tokens(a, "a", n);
  check_tokens(b, "b", n);
  b_valid = mask_of(b_valid, "b_valid", batch, targets);
  Tensor best = torch::stable::new_empty(unit, {batch, sources});
  Tensor at = torch::stable::new_empty(a, {batch, sources});
  const auto images = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* x = data<float>(unit) + i * n * d;
      std::vector<const float*> rows(sources), columns(targets);
      for (int64_t s = 0; s < sources; ++s) rows[s] = x + data<int64_t>(a)[i * sources + s] * d;
      for (int64_t t = 0; t < targets; ++t) columns[t] = x + data<int64_t>(b)[i * targets + t] * d;
      const vtc::Columns packed(columns.data(), targets, d);
      const auto part = [&](int64_t from, int64_t to) {
        vtc::match_rows(rows.data(), from * vtc::ROWS, std::min(sources, to * vtc::ROWS), packed, row(b_valid, i, targets),
                        data<float>(best) + i * sources, data<int64_t>(at) + i * sources);
      };
      torch::stable::parallel_for(0, (sources + vtc::ROWS - 1) / vtc::ROWS, 1, part);
    }
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return {best, at};
}

Tensor each_of(Tensor each, int64_t batch, int64_t most, int64_t n) {
  each = ready(each, "each", ScalarType::Long, 1);
  STD_TORCH_CHECK(each.size(0) == batch, "each is ", shape(each), ", one count for each of ", batch, " images");
  STD_TORCH_CHECK(most >= 0 && most <= n, "most is ", most, ", but there are ", n, " tokens");
  return each;
}

std::tuple<Tensor, Tensor, Tensor> top_pairs(Tensor best, Tensor at, Tensor a, Tensor b, Maybe each, int64_t most,
                                             Maybe a_valid) {
  best = ready(best, "best", ScalarType::Float, 2);
  at = ready(at, "at", ScalarType::Long, 2);
  a = ready(a, "a", ScalarType::Long, 2);
  b = ready(b, "b", ScalarType::Long, 2);
  const int64_t batch = best.size(0), n = best.size(1), targets = b.size(1);
  same(at, "at", batch, n);
  same(a, "a", batch, n);
  same(b, "b", batch, targets);
  check_tokens(at, "at", targets);
  a_valid = mask_of(a_valid, "a_valid", batch, n);
  STD_TORCH_CHECK(most >= 0 && most <= n, "most is ", most, ", but there are ", n, " pairs");
  if (each.has_value()) each = each_of(*each, batch, most, n);
  Tensor source = torch::stable::new_empty(a, {batch, most}), target = torch::stable::new_empty(a, {batch, most});
  Tensor score = torch::stable::new_empty(best, {batch, most});
  const auto images = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      vtc::top_pairs(data<float>(best) + i * n, data<int64_t>(at) + i * n, data<int64_t>(a) + i * n,
                     data<int64_t>(b) + i * targets, row(a_valid, i, n), n, each.has_value() ? data<int64_t>(*each)[i] : most,
                     most, data<int64_t>(source) + i * most, data<int64_t>(target) + i * most, data<float>(score) + i * most);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return {source, target, score};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_round(Tensor metric, Maybe weight, int64_t r, int64_t prefix, int64_t form,
                                                      double margin, double alpha, bool half, bool protect) {
  const bool several = metric.dim() == 4;  // [B, N, H, D], read where they lie, as a view of an attention's projection
  if (!several || metric.stride(3) != 1) metric = ready(metric, "metric", ScalarType::Float, several ? 4 : 3);
  STD_TORCH_CHECK(metric.is_cpu() && metric.scalar_type() == ScalarType::Float, "metric has the wrong type or device");
  const int64_t batch = metric.size(0), n = metric.size(1), d = metric.size(several ? 3 : 2);
  const int64_t heads = several ? metric.size(2) : 1, head = several ? metric.stride(2) : d;
  STD_TORCH_CHECK(heads > 0, "metric is ", shape(metric), ": it has no heads");
  if (weight.has_value()) {
    weight = ready(*weight, "weight", ScalarType::Float, 2);
    same(*weight, "weight", batch, n);
  }
  STD_TORCH_CHECK(prefix >= 0 && prefix <= n, "prefix is ", prefix, ", but there are ", n, " tokens");
  STD_TORCH_CHECK(r >= 0 && r <= (n - prefix) / 2, "r is ", r, ": at most half of the ", n - prefix, " tokens behind the prefix");
  STD_TORCH_CHECK(form >= -1 && form < 4, "unknown energy ", form, "; choose -1 = none, 0 = elu, 1 = paper, 2 = gaussian, 3 = nearest");
  const vtc::Round how{r, prefix, form >= 0, vtc::Form(form < 0 ? 0 : form), margin, float(alpha), half, protect};
  Tensor group = torch::stable::new_empty(metric, {batch, n}, ScalarType::Long);
  Tensor source = torch::stable::new_empty(metric, {batch, r}, ScalarType::Long);
  Tensor size = torch::stable::new_empty(metric, {batch, n - r}), score = torch::stable::new_empty(metric, {batch, r});
  const auto images = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      vtc::pair_round({data<float>(metric) + b * metric.stride(0), heads, metric.stride(1), head},
                      weight.has_value() ? data<float>(*weight) + b * n : nullptr, n, d, how,
                      data<int64_t>(group) + b * n, data<float>(size) + b * (n - r), data<int64_t>(source) + b * r,
                      data<float>(score) + b * r);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return {group, size, source, score};
}

}  // namespace
namespace vtc {
VTC_MERGE(c10::BFloat16)
VTC_MERGE(c10::Half)
}  // namespace vtc
namespace {

template <class T>
void merge_typed(const Tensor& x, const Tensor& group, const float* weight, int64_t slots, const Tensor& out) {
  const int64_t batch = x.size(0), n = x.size(1), c = x.size(2), slices = (c + vtc::SLICE - 1) / vtc::SLICE;
  const auto part = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / slices, from = i % slices * vtc::SLICE;
      const vtc::Members members(data<int64_t>(group) + b * n, n, slots);
      vtc::merge_slice(data<T>(x) + b * n * c, members, weight == nullptr ? nullptr : weight + b * n, slots, c, from,
                       std::min(vtc::SLICE, c - from), data<T>(out) + b * slots * c);
    }
  };
  torch::stable::parallel_for(0, batch * slices, 1, part);
}

template <class T>
void merge_back_typed(const Tensor& grad, const Tensor& group, const float* weight, int64_t slots, const Tensor& out) {
  const int64_t batch = grad.size(0), c = grad.size(2), n = group.size(1);
  const auto part = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      vtc::merge_back(data<T>(grad) + b * slots * c, data<int64_t>(group) + b * n, weight == nullptr ? nullptr : weight + b * n, n,
                      c, slots, data<T>(out) + b * n * c);
  };
  torch::stable::parallel_for(0, batch, 1, part);
}

struct Groups {
  Tensor group;
  Maybe weight;
  const float* each;
};

Groups groups(Tensor group, Maybe weight, int64_t batch, int64_t slots) {
  group = ready(group, "group", ScalarType::Long, 2);
  same(group, "group", batch, group.size(1));
  STD_TORCH_CHECK(slots >= 0, "slots is ", slots, ": it takes a number >= 0");
  for (int64_t i = 0; i < group.numel(); ++i) {
    const int64_t at = data<int64_t>(group)[i];
    STD_TORCH_CHECK(at >= -1 && at < slots, "group holds ", at, ", but there are ", slots, " slots (-1 = none)");
  }
  if (weight.has_value()) {
    weight = ready(*weight, "weight", ScalarType::Float, 2);
    same(*weight, "weight", batch, group.size(1));
  }
  const float* each = weight.has_value() ? data<float>(*weight) : nullptr;
  return {group, weight, each};
}

// Calls f.operator()<T>() for the tensor's type.
template <class F>
void typed(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) f(float());
  else if (x.scalar_type() == ScalarType::BFloat16) f(c10::BFloat16());
  else if (x.scalar_type() == ScalarType::Half) f(c10::Half());
  else STD_TORCH_CHECK(false, "x has the wrong type: it takes float32, bfloat16 or float16");
}

Tensor merge(Tensor x, Tensor group, int64_t slots, Maybe weight) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "x is ", shape(x), ": it takes [B, N, C] on the CPU");
  x = torch::stable::contiguous(x);
  const Groups of = groups(group, weight, x.size(0), slots);
  STD_TORCH_CHECK(of.group.size(1) == x.size(1), "group is ", shape(of.group), " for ", x.size(1), " tokens");
  Tensor out = torch::stable::new_empty(x, {x.size(0), slots, x.size(2)});
  typed(x, [&](auto zero) { merge_typed<decltype(zero)>(x, of.group, of.each, slots, out); });
  return out;
}

Tensor merge_backward(Tensor grad, Tensor group, Maybe weight, int64_t slots) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 3, "grad is ", shape(grad), ": it takes [B, M, C] on the CPU");
  grad = torch::stable::contiguous(grad);
  const Groups of = groups(group, weight, grad.size(0), slots);
  STD_TORCH_CHECK(grad.size(1) == slots, "grad is ", shape(grad), " for ", slots, " slots");
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), of.group.size(1), grad.size(2)});
  typed(grad, [&](auto zero) { merge_back_typed<decltype(zero)>(grad, of.group, of.each, slots, out); });
  return out;
}

Tensor rows(Tensor x, Tensor at) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "x is ", shape(x), ": it takes [B, N, C] on the CPU");
  x = torch::stable::contiguous(x);
  at = ready(at, "at", ScalarType::Long, 2);
  const int64_t batch = x.size(0), n = x.size(1), m = at.size(1);
  same(at, "at", batch, m);
  for (int64_t i = 0; i < at.numel(); ++i) {
    const int64_t row = data<int64_t>(at)[i];
    STD_TORCH_CHECK(row >= -1 && row < n, "at holds ", row, ", but there are ", n, " tokens (-1 = none)");
  }
  int64_t bytes = x.size(2);
  typed(x, [&](auto zero) { bytes *= sizeof(zero); });
  Tensor out = torch::stable::new_empty(x, {batch, m, x.size(2)});
  const int64_t parts = (m + 63) / 64;
  const auto part = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / parts, from = i % parts * 64;
      vtc::take_rows(data<char>(x) + b * n * bytes, data<int64_t>(at) + b * m + from, std::min<int64_t>(64, m - from), bytes,
                     data<char>(out) + (b * m + from) * bytes);
    }
  };
  torch::stable::parallel_for(0, batch * parts, 1, part);
  return out;
}

// How many tokens an image gets: what was asked, at most its real ones and `most`.
int64_t budget(const Tensor& each, const bool* mask, int64_t b, int64_t n, int64_t most) {
  int64_t real = n;
  if (mask != nullptr) real = std::count(mask, mask + n, true);
  return std::max<int64_t>(0, std::min({data<int64_t>(each)[b], real, most}));
}

Tensor greedy_select(Tensor unit, Maybe importance, Tensor each, int64_t most, int64_t kind, double balance, int64_t step,
                     Maybe mask) {
  unit = ready(unit, "unit", ScalarType::Float, 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  each = each_of(each, batch, most, n);
  mask = mask_of(mask, "mask", batch, n);
  STD_TORCH_CHECK(step >= 1, "step is ", step, ": it takes a number of tokens >= 1");
  STD_TORCH_CHECK(kind >= 0 && kind < 3, "unknown selection ", kind, "; choose 0 = mmr, 1 = sads, 2 = max_min");
  const vtc::Kind k = vtc::Kind(kind);
  Tensor first = unit;
  if (k == vtc::Kind::max_min) {
    first = energy(unit, int64_t(vtc::Form::nearest), 0.0, 1.0, mask);
    float* nearest = data<float>(first);
    for (int64_t i = 0; i < batch * n; ++i) nearest[i] = -(nearest[i] > vtc::SAME ? 1.0f : nearest[i]);
  } else {
    STD_TORCH_CHECK(importance.has_value(), "all selections but max_min need importance");
    first = ready(*importance, "importance", ScalarType::Float, 2);
    same(first, "importance", batch, n);
  }
  Tensor order = torch::stable::new_empty(each, {batch, most});
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      const float* scores = data<float>(first) + b * n;
      vtc::greedy(data<float>(unit) + b * n * d, n, d, scores, scores, k, float(balance), step,
                  budget(each, row(mask, b, n), b, n, most), most, row(mask, b, n), data<int64_t>(order) + b * most);
    }
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return order;
}

Tensor dpp_select(Tensor unit, Tensor relevance, Tensor each, int64_t most, Maybe mask) {
  unit = ready(unit, "unit", ScalarType::Float, 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  relevance = ready(relevance, "relevance", ScalarType::Float, 2);
  same(relevance, "relevance", batch, n);
  each = each_of(each, batch, most, n);
  mask = mask_of(mask, "mask", batch, n);
  Tensor order = torch::stable::new_empty(each, {batch, most});
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      vtc::dpp(data<float>(unit) + b * n * d, n, d, data<float>(relevance) + b * n, budget(each, row(mask, b, n), b, n, most),
               most, row(mask, b, n), data<int64_t>(order) + b * most);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return order;
}

Tensor cosines(Tensor unit, Maybe mask) {
  unit = ready(unit, "unit", ScalarType::Float, 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  mask = mask_of(mask, "mask", batch, n);
  Tensor out = torch::stable::new_empty(unit, {batch, n, n});
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      float* table = data<float>(out) + b * n * n;
      const std::vector<int64_t> real = vtc::marked(row(mask, b, n), n);
      if (int64_t(real.size()) < n) std::fill(table, table + n * n, 0.0f);
      vtc::all_pairs(data<float>(unit) + b * n * d, real, d, n, [&](int64_t i) { return real[i]; }, table);
    }
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return out;
}

Tensor cover_select(Tensor gains, Maybe weight, Tensor each, int64_t most, Maybe mask, Maybe items) {
  gains = ready(gains, "gains", ScalarType::Float, 3);
  const int64_t batch = gains.size(0), n = gains.size(1), all = gains.size(2);
  if (weight.has_value()) {
    weight = ready(*weight, "weight", ScalarType::Float, 2);
    same(*weight, "weight", batch, n);
  }
  each = each_of(each, batch, most, n);
  mask = mask_of(mask, "mask", batch, n);
  items = mask_of(items, "items", batch, all);
  Tensor order = torch::stable::new_empty(each, {batch, most});
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      vtc::coverage(data<float>(gains) + b * n * all, n, all, weight.has_value() ? data<float>(*weight) + b * n : nullptr,
                    budget(each, row(mask, b, n), b, n, most), most, row(mask, b, n), row(items, b, all),
                    data<int64_t>(order) + b * most);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return order;
}

Tensor distinct_select(Tensor unit, Tensor chosen, Tensor each) {
  unit = ready(unit, "unit", ScalarType::Float, 3);
  const int64_t batch = unit.size(0), n = unit.size(1), d = unit.size(2);
  chosen = *mask_of(chosen, "chosen", batch, n);
  each = each_of(each, batch, n, n);
  Tensor out = torch::stable::new_empty(chosen, {batch, n});
  std::copy(data<bool>(chosen), data<bool>(chosen) + batch * n, data<bool>(out));
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      vtc::distinct(data<float>(unit) + b * n * d, n, d, data<int64_t>(each)[b], data<bool>(out) + b * n);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dpc_knn(Tensor x, Tensor each, int64_t most, int64_t neighbors, Maybe mask) {
  x = ready(x, "x", ScalarType::Float, 3);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2);
  each = each_of(each, batch, most, n);
  mask = mask_of(mask, "mask", batch, n);
  STD_TORCH_CHECK(neighbors >= 1, "neighbors is ", neighbors, ": it takes a number >= 1");
  Tensor order = torch::stable::new_empty(each, {batch, most});
  Tensor target = torch::stable::new_empty(each, {batch, n});
  Tensor distance = torch::stable::new_empty(x, {batch, n});
  const auto images = [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      vtc::dpc_knn(data<float>(x) + b * n * d, n, d, budget(each, row(mask, b, n), b, n, most), most, neighbors,
                   row(mask, b, n), data<int64_t>(order) + b * most, data<int64_t>(target) + b * n,
                   data<float>(distance) + b * n);
  };
  torch::stable::parallel_for(0, batch, 1, images);
  return {order, target, distance};
}

Tensor received(Tensor query, Tensor key, double scale, Maybe mask) {
  query = ready(query, "query", ScalarType::Float, 4);
  key = ready(key, "key", ScalarType::Float, 4);
  const int64_t batch = query.size(0), heads = query.size(1), m = query.size(2), d = query.size(3);
  const int64_t key_heads = key.size(1), n = key.size(2);
  STD_TORCH_CHECK(key.size(0) == batch && key.size(3) == d, "query ", shape(query), " and key ", shape(key), " do not fit together");
  STD_TORCH_CHECK(heads > 0 && key_heads > 0 && heads % key_heads == 0, heads, " query heads cannot share ", key_heads,
                  " key heads evenly");
  mask = mask_of(mask, "mask", batch, n);
  Tensor part = torch::stable::new_empty(query, {batch, heads, n}), out = torch::stable::new_empty(query, {batch, n});
  const auto each = [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) {
      const int64_t b = at / heads, of = b * key_heads + at % heads / (heads / key_heads);
      const vtc::Columns keys(vtc::pointers(data<float>(key) + of * n * d, n, d).data(), n, d);
      const bool* real = row(mask, b, n);
      vtc::received_head(data<float>(query) + at * m * d, m, keys, real, m == n ? real : nullptr, float(scale),
                         data<float>(part) + at * n);
    }
  };
  torch::stable::parallel_for(0, batch * heads, 1, each);
  for (int64_t b = 0; b < batch; ++b)  // the heads in their order, whoever computed them
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int64_t h = 0; h < heads; ++h) sum += data<float>(part)[(b * heads + h) * n + j];
      data<float>(out)[b * n + j] = sum / float(heads);
    }
  return out;
}

Tensor probe_norms(Tensor difference, double step) {
  difference = ready(difference, "difference", ScalarType::Float, 4);
  STD_TORCH_CHECK(step > 0, "step is ", step, ": it takes a length above 0");
  const int64_t tokens = difference.size(1) * difference.size(2);
  Tensor out = torch::stable::new_empty(difference, {difference.size(1), difference.size(2)});
  const auto part = [&](int64_t first, int64_t last) {
    vtc::probe_norms(data<float>(difference), difference.size(0), tokens, difference.size(3), first, last, step,
                     data<float>(out));
  };
  torch::stable::parallel_for(0, tokens, 16, part);
  return out;
}

Tensor minmax(Tensor scores, Maybe mask, double eps, double floor) {
  scores = ready(scores, "scores", ScalarType::Float, 2);
  const int64_t batch = scores.size(0), n = scores.size(1);
  mask = mask_of(mask, "mask", batch, n);
  Tensor out = torch::stable::new_empty(scores, {batch, n});
  for (int64_t b = 0; b < batch; ++b)
    vtc::minmax(data<float>(scores) + b * n, n, row(mask, b, n), float(eps), float(floor), data<float>(out) + b * n);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vtc, CPU, m) {
  m.impl("energy", TORCH_BOX(&energy));
  m.impl("match", TORCH_BOX(&match));
  m.impl("top_pairs", TORCH_BOX(&top_pairs));
  m.impl("pair_round", TORCH_BOX(&pair_round));
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_backward", TORCH_BOX(&merge_backward));
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("greedy_select", TORCH_BOX(&greedy_select));
  m.impl("dpp_select", TORCH_BOX(&dpp_select));
  m.impl("cosines", TORCH_BOX(&cosines));
  m.impl("cover_select", TORCH_BOX(&cover_select));
  m.impl("distinct_select", TORCH_BOX(&distinct_select));
  m.impl("dpc_knn", TORCH_BOX(&dpc_knn));
  m.impl("received", TORCH_BOX(&received));
  m.impl("probe_norms", TORCH_BOX(&probe_norms));
  m.impl("minmax", TORCH_BOX(&minmax));
}
