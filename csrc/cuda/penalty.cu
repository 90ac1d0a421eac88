// The TRT weight regularizer on the GPU: all tensors and all T terms in one launch each way.
//
// A block takes a chunk of one tensor, which it finds in a table among the kernel's arguments: no
// copy to the device, nothing that a CUDA graph would have to keep alive. Divisions would decide
// the time, so two terms share one reciprocal.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../arguments.h"
#include "../math/regularizer.h"
#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace trt {
namespace cuda {
namespace {

using Index = std::int64_t;

constexpr int kElements = 8;                     // of a thread at once
constexpr int kTile = kThreads * kElements;      // of a block at once
constexpr int kTiles = 8;                        // of a chunk: fewer, and its sum costs as much
constexpr Index kChunk = Index(kTile) * kTiles;  // elements of one partial sum
// Minimum resident blocks per SM for `__launch_bounds__`.
template <class F>
constexpr int kLeastBlocks = sizeof(F) == 8 ? 5 : 10;
constexpr int kMostTerms = 64;  // that travel as arguments

// Tensors of one launch: few in the 4 KB of arguments that every driver takes, many in the 32 KB
// that CUDA 12.1 brought.
constexpr int kFewTensors = 80;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyTensors = kFewTensors;
#else
constexpr int kManyTensors = 800;
#endif

struct Entry {
  const void* weight;
  void* grad;
  Index size;
  unsigned first_chunk;  // of this launch
  unsigned char dtype;
  bool accumulate, in_vectors;  // in_vectors: both addresses suit 16-byte accesses
};

template <int kTensors>
struct Table {
  Entry entries[kTensors];
  int count;
};

// The terms of the sum over t but those without growth, each of which adds 1 (or 2, to the slope).
// Where they are too many for arguments they lie in memory.
template <class F>
struct Term {
  F growth, offset;
};

template <class F>
struct Terms {
  Term<F> terms[kMostTerms];
  const Term<F>* more;
  int count;
  F flat;     // how many have no growth
  F largest;  // |w| is held at this, so that every denominator is finite; beyond, terms are nothing
};

// pair(term, the next term) for the terms by pairs, and single(term) for one that is left. The
// first pair stands alone, so that sums start in its instructions and not by moves.
template <class At, class Pair, class Single>
__device__ __forceinline__ void by_pairs(int count, At&& at, Pair&& pair, Single&& single) {
  if (count > 1) pair(at(0), at(1));
  int t = 2;
#pragma unroll 1
  for (; t + 1 < count; t += 2) pair(at(t), at(t + 1));
  if (count % 2 != 0) single(at(count - 1));
}

// The sum over t of 1/d_t (the value over w^2) or of (d_t + offset_t) / d_t^2 (the slope over w).
template <bool kGradient, class F>
__device__ __forceinline__ void sum_terms(const Terms<F>& terms, const F (&w)[kElements],
                                          F (&sum)[kElements]) {
  F a[kElements];
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    a[j] = smaller(absolute(w[j]), terms.largest);
    sum[j] = kGradient ? F(2) * terms.flat : terms.flat;
  }
  const auto pair = [&](const Term<F>& p, const Term<F>& q) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const F d = weight_denominator(a[j], p.growth, p.offset);
      const F e = weight_denominator(a[j], q.growth, q.offset);
      const F inverse = fast_reciprocal(d * e);
      if (kGradient) {
        sum[j] = add_weight_slope(sum[j], d, inverse * e, p.offset);
        sum[j] = add_weight_slope(sum[j], e, inverse * d, q.offset);
      } else {
        sum[j] = fast_multiply_add(d + e, inverse, sum[j]);
      }
    }
  };
  const auto single = [&](const Term<F>& p) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const F d = weight_denominator(a[j], p.growth, p.offset);
      const F inverse = fast_reciprocal(d);
      sum[j] = kGradient ? add_weight_slope(sum[j], d, inverse, p.offset) : sum[j] + inverse;
    }
  };
  if (terms.more) {
    by_pairs(terms.count, [&](int t) { return terms.more[t]; }, pair, single);
  } else {
    by_pairs(terms.count, [&](int t) { return terms.terms[t]; }, pair, single);
  }
}

// Neighbouring elements that one access moves. A thread's accesses of a tile lie a block apart, so
// that those of neighbouring threads are neighbours.
template <class Storage>
constexpr int kNeighbours = Access<Storage, kElements>::kElements;

// Where element j of a thread is, from its first one.
template <class Storage>
__device__ __forceinline__ constexpr int place_of(int j) {
  constexpr int kMost = kNeighbours<Storage>;
  return j / kMost * (kMost * kThreads) + j % kMost;
}

// A thread's elements of a tile: all, in 16-byte accesses, where kAll, or those before `left`. The
// others are 0, which adds nothing.
template <bool kAll, class Storage>
__device__ __forceinline__ void load_elements(const Storage* from, int left,
                                              State<Storage> (&to)[kElements]) {
  constexpr int kMost = kNeighbours<Storage>;
  if constexpr (kAll) {
#pragma unroll
    for (int j = 0; j < kElements; j += kMost) {
      const auto vector =
          *reinterpret_cast<const Vector<Storage, kMost>*>(from + place_of<Storage>(j));
      State<Storage> part[kMost];
      unpack(vector, part);
#pragma unroll
      for (int i = 0; i < kMost; ++i) to[j + i] = part[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int place = place_of<Storage>(j);
      to[j] = place < left ? load(from[place]) : State<Storage>(0);
    }
  }
}

template <bool kAll, class Storage>
__device__ __forceinline__ void store_elements(Storage* to, int left,
                                               const State<Storage> (&from)[kElements]) {
  constexpr int kMost = kNeighbours<Storage>;
  if constexpr (kAll) {
#pragma unroll
    for (int j = 0; j < kElements; j += kMost) {
      State<Storage> part[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i) part[i] = from[j + i];
      Vector<Storage, kMost> vector;
      pack(part, vector);
      *reinterpret_cast<Vector<Storage, kMost>*>(to + place_of<Storage>(j)) = vector;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int place = place_of<Storage>(j);
      if (place < left) store(&to[place], from[j]);
    }
  }
}

// Position of the tensor that this block's chunk belongs to.
template <int kTensors>
__device__ __forceinline__ int find_tensor(const Table<kTensors>& table) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_chunk <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// f(whether 16-byte accesses serve, index of this thread's first element, elements from there on)
// for every tile of this block's chunk.
template <class Storage, class Function>
__device__ __forceinline__ void for_tiles(const Entry& entry, Function&& f) {
  constexpr int kSpan = place_of<Storage>(kElements - 1) + 1;
  Index index = static_cast<Index>(blockIdx.x - entry.first_chunk) * kChunk +
                static_cast<Index>(threadIdx.x) * kNeighbours<Storage>;
  // As many elements as this chunk needs, in 32 bits: 64-bit arithmetic takes two instructions.
  const Index all = entry.size - index;
  int left = static_cast<int>(all < kChunk ? all : kChunk);
  const int span = entry.in_vectors ? kSpan : static_cast<int>(kChunk) + 1;
#pragma unroll 1
  for (; left > 0; left -= kTile) {
    if (left >= span) {
      f(std::true_type(), index, left);
    } else {
      f(std::false_type(), index, left);
    }
    index += kTile;
  }
}

// Calls f(Storage()) for a storage type whose state is F.
template <class F, class Function>
__device__ __forceinline__ void visit_storage(int dtype, Function&& f) {
  if constexpr (std::is_same<F, double>::value) {
    f(double());
  } else if (dtype == static_cast<int>(DType::float32)) {
    f(float());
  } else if (dtype == static_cast<int>(DType::float16)) {
    f(Half());
  } else {
    f(BFloat16());
  }
}

template <class Storage>
__device__ __forceinline__ double chunk_value(const Terms<State<Storage>>& terms,
                                              const Entry& entry) {
  using F = State<Storage>;
  double total = 0;
  const Storage* weight = static_cast<const Storage*>(entry.weight);
  for_tiles<Storage>(entry, [&](auto all, Index index, int left) {
    F w[kElements], sum[kElements];
    load_elements<decltype(all)::value>(weight + index, left, w);
    sum_terms<false>(terms, w, sum);
    F of_tile = F(0);
#pragma unroll
    for (int j = 0; j < kElements; ++j) of_tile = fast_multiply_add(w[j] * w[j], sum[j], of_tile);
    total += static_cast<double>(of_tile);
  });
  return total;
}

// What the value's blocks share: all partial sums of this call, over all of its launches.
struct Partials {
  double* sums;
  unsigned* arrived;
  unsigned first, all;  // this launch's first chunk, and the chunks of all launches
  double scale;
  void* out;
  bool out_is_double;
};

template <class F, int kTensors>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<F>)
    value_kernel(const __grid_constant__ Table<kTensors> table,
                 const __grid_constant__ Terms<F> terms, const Partials partials) {
  const Entry& entry = table.entries[find_tensor(table)];
  double sum = 0;
  visit_storage<F>(entry.dtype,
                   [&](auto storage) { sum = chunk_value<decltype(storage)>(terms, entry); });
  sum = sum_block<kThreads>(sum);
  if (threadIdx.x == 0) partials.sums[partials.first + blockIdx.x] = sum;
  if (!is_last_block(partials.arrived, partials.all)) return;
  const double total = partials.scale * sum_all<kThreads>(partials.sums, partials.all);
  if (threadIdx.x != 0) return;
  if (partials.out_is_double) {
    *static_cast<double*>(partials.out) = total;
  } else {
    *static_cast<float*>(partials.out) = static_cast<float>(total);
  }
}

// The factor of the gradient: a number, times the upstream scalar where there is one.
struct Factor {
  double scale;
  const void* upstream;
  bool upstream_is_double;
};

template <class F>
__device__ __forceinline__ F read_factor(const Factor& factor) {
  if (!factor.upstream) return static_cast<F>(factor.scale);
  const double upstream = factor.upstream_is_double
                              ? *static_cast<const double*>(factor.upstream)
                              : static_cast<double>(*static_cast<const float*>(factor.upstream));
  return static_cast<F>(factor.scale * upstream);
}

template <class F, int kTensors>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<F>)
    gradient_kernel(const __grid_constant__ Table<kTensors> table,
                    const __grid_constant__ Terms<F> terms, const Factor factor) {
  const Entry& entry = table.entries[find_tensor(table)];
  const F scale = read_factor<F>(factor);
  visit_storage<F>(entry.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const Storage* weight = static_cast<const Storage*>(entry.weight);
    Storage* grad = static_cast<Storage*>(entry.grad);
    for_tiles<Storage>(entry, [&](auto all, Index index, int left) {
      constexpr bool kAll = decltype(all)::value;
      F w[kElements], sum[kElements];
      load_elements<kAll>(weight + index, left, w);
      sum_terms<true>(terms, w, sum);
#pragma unroll
      for (int j = 0; j < kElements; ++j) sum[j] = scale * w[j] * sum[j];
      if (entry.accumulate) {
        F before[kElements];
        load_elements<kAll>(grad + index, left, before);
#pragma unroll
        for (int j = 0; j < kElements; ++j) sum[j] += before[j];
      }
      store_elements<kAll>(grad + index, left, sum);
    });
  });
}

// Terms that are too many for the arguments of the kernels that use them, a part at a time.
template <class F>
__global__ void __launch_bounds__(kThreads)
    terms_kernel(const __grid_constant__ Terms<F> part, Term<F>* to) {
  for (int t = threadIdx.x; t < part.count; t += kThreads) to[t] = part.terms[t];
}

int growing_terms(const PenaltySettings& settings) {
  return static_cast<int>(std::count_if(settings.growth.begin(), settings.growth.end(),
                                        [](double growth) { return growth != 0; }));
}

// Bytes of the terms in memory, where they do not travel as arguments; for either state type.
Index terms_bytes(const PenaltySettings& settings) {
  const int count = growing_terms(settings);
  return count <= kMostTerms ? 0 : count * static_cast<Index>(sizeof(Term<double>));
}

template <class F>
Terms<F> make_terms(const PenaltySettings& settings, Term<F>* space, const Queue& queue) {
  const double finite = std::is_same<F, double>::value ? 1e300 : 1e36;
  double steepest = 1;
  Terms<F> terms{};
  const int all = growing_terms(settings);
  const bool in_memory = all > kMostTerms;
  const auto flush = [&] {
    TRT_LAUNCH("trt_penalty terms", terms_kernel<F>, 1, kThreads, 0, queue.stream, terms, space);
    space += terms.count;
    terms.count = 0;
  };
  if (in_memory) terms.more = space;
  for (double growth : settings.growth) {
    if (growth == 0) {
      terms.flat += F(1);
      continue;
    }
    if (terms.count == kMostTerms) flush();
    terms.terms[terms.count++] = {static_cast<F>(growth),
                                  static_cast<F>(std::min(finite, 1 + growth * settings.eps))};
    steepest = std::max(steepest, growth);
  }
  if (in_memory) flush();
  terms.count = all;
  terms.largest = static_cast<F>(finite / steepest);
  return terms;
}

bool is_double(const PenaltyTensor& tensor) { return tensor.dtype == DType::float64; }

Index chunks_of(const PenaltyTensor& tensor) { return ceil_div(tensor.size, kChunk); }

Index all_chunks(const std::vector<PenaltyTensor>& tensors) {
  Index count = 0;
  for (const PenaltyTensor& tensor : tensors) count += chunks_of(tensor);
  return count;
}

// Calls launch(table, blocks, chunks before) for tables of the tensors whose state type is F.
template <class F, int kTensors, class Launch>
void for_tables(const std::vector<PenaltyTensor>& tensors, Index& before, Launch&& launch) {
  Table<kTensors> table{};
  Index blocks = 0;
  const auto flush = [&] {
    if (table.count > 0) launch(table, blocks, before);
    before += blocks;
    table.count = 0;
    blocks = 0;
  };
  for (const PenaltyTensor& tensor : tensors) {
    if (tensor.size == 0 || is_double(tensor) != std::is_same<F, double>::value) continue;
    if (table.count == kTensors) flush();
    const bool in_vectors =
        aligned<char, kVectorBytes>(tensor.weight) && aligned<char, kVectorBytes>(tensor.grad);
    table.entries[table.count++] = {tensor.weight,
                                    tensor.grad,
                                    tensor.size,
                                    static_cast<unsigned>(blocks),
                                    static_cast<unsigned char>(tensor.dtype),
                                    tensor.accumulate,
                                    in_vectors};
    blocks += chunks_of(tensor);
  }
  flush();
}

// Calls launch(F(), table, blocks, chunks before) until every tensor has had its turn: once, but
// for lists that mix float64 with others or are longer than the largest table.
template <class Launch>
void for_all_tables(const std::vector<PenaltyTensor>& tensors, Launch&& launch) {
  Index before = 0;
  const auto of_type = [&](auto zero) {
    using F = decltype(zero);
    const auto launch_table = [&](const auto& table, Index blocks, Index first) {
      launch(F(), table, blocks, first);
    };
    if (tensors.size() <= kFewTensors) {
      for_tables<F, kFewTensors>(tensors, before, launch_table);
    } else {
      for_tables<F, kManyTensors>(tensors, before, launch_table);
    }
  };
  of_type(float());
  of_type(double());
}

// Both kinds of terms, each made where a tensor asks for it.
struct AllTerms {
  const PenaltySettings& settings;
  const std::vector<PenaltyTensor>& tensors;
  void* space;
  const Queue& queue;

  template <class F>
  Terms<F> make() const {
    const bool twice = std::is_same<F, double>::value;
    const bool asked = std::any_of(
        tensors.begin(), tensors.end(),
        [&](const PenaltyTensor& tensor) { return tensor.size > 0 && is_double(tensor) == twice; });
    if (!asked) return {};
    return make_terms(settings, static_cast<Term<F>*>(space), queue);
  }
};

}  // namespace

std::int64_t penalty_value_workspace(const PenaltySettings& settings, std::int64_t elements,
                                     std::int64_t tensors) {
  const Index most_chunks = elements / kChunk + tensors;
  return kArrivedBytes + terms_bytes(settings) + most_chunks * static_cast<Index>(sizeof(double));
}

std::int64_t penalty_gradient_workspace(const PenaltySettings& settings) {
  return terms_bytes(settings);
}

void penalty_value(const PenaltySettings& settings, const std::vector<PenaltyTensor>& tensors,
                   DType dtype, void* out, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const bool out_is_double = dtype == DType::float64;
  const Index chunks = all_chunks(tensors);
  if (chunks == 0) {
    check(cudaMemsetAsync(out, 0, out_is_double ? 8 : 4, stream), "clearing the penalty");
    return;
  }
  char* space = static_cast<char*>(queue.workspace);
  // 2 us of a pass of 12 us over ResNet-19, by count. A counter that the last block resets would
  // need no clearing, but overlapping streams and graph replays would share it.
  check(cudaMemsetAsync(space, 0, kArrivedBytes, stream), "clearing a counter");
  double* sums = reinterpret_cast<double*>(space + kArrivedBytes + terms_bytes(settings));
  const AllTerms all{settings, tensors, space + kArrivedBytes, queue};
  for_all_tables(tensors, [&](auto zero, const auto& table, Index blocks, Index first) {
    using F = decltype(zero);
    constexpr int kTensors = sizeof(table.entries) / sizeof(Entry);
    const Terms<F> terms = all.make<F>();
    const Partials partials{sums,
                            reinterpret_cast<unsigned*>(space),
                            static_cast<unsigned>(first),
                            static_cast<unsigned>(chunks),
                            settings.scale,
                            out,
                            out_is_double};
    TRT_LAUNCH("trt_penalty value", (value_kernel<F, kTensors>), blocks, kThreads, 0, queue.stream,
               table, terms, partials);
  });
}

void penalty_gradient(const PenaltySettings& settings, const std::vector<PenaltyTensor>& tensors,
                      double scale, DType dtype, const void* upstream, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const AllTerms all{settings, tensors, queue.workspace, queue};
  const Factor factor{settings.scale * scale, upstream, dtype == DType::float64};
  for_all_tables(tensors, [&](auto zero, const auto& table, Index blocks, Index) {
    using F = decltype(zero);
    constexpr int kTensors = sizeof(table.entries) / sizeof(Entry);
    const Terms<F> terms = all.make<F>();
    TRT_LAUNCH("trt_penalty gradient", (gradient_kernel<F, kTensors>), blocks, kThreads, 0,
               queue.stream, table, terms, factor);
  });
}

}  // namespace cuda
}  // namespace trt
