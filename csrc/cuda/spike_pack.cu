// Spikes as bits, and back, on the GPU: a thread takes the eight elements of one byte.
#include <cstring>

#include "../arguments.h"
#include "../math/spike_word.h"
#include "launch.h"
#include "vector.h"

namespace trt {
namespace cuda {
namespace {

using Index = std::int64_t;

constexpr int kElements = 8;  // of a thread: those of one byte

// A flag that many threads may clear and none sets. They all write the same, so that no order
// between them matters; who still reads the old value does some work in vain. It is read through
// the first-level cache: every warp asks, and one address of the second level would hold them up.
__device__ __forceinline__ bool is_set(const std::uint8_t* flag) {
#ifdef __CUDA_ARCH__
  return *flag;
#else
  return __atomic_load_n(flag, __ATOMIC_RELAXED);
#endif
}
__device__ __forceinline__ void clear(std::uint8_t* flag) {
#ifdef __CUDA_ARCH__
  *static_cast<volatile std::uint8_t*>(flag) = 0;
#else
  __atomic_store_n(flag, std::uint8_t(0), __ATOMIC_RELAXED);
#endif
}

// Eight words as the 16-byte accesses that move them.
template <class Word>
struct Words {
  static constexpr int kCount = kElements * sizeof(Word) / kVectorBytes;
  using Part = Vector<std::uint32_t, kVectorBytes / 4>;

  __device__ __forceinline__ static void read(const Word* from, Word (&to)[kElements]) {
    Part parts[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) parts[i] = reinterpret_cast<const Part*>(from)[i];
    std::memcpy(to, parts, sizeof(to));
  }
  __device__ __forceinline__ static void write(Word* to, const Word (&from)[kElements]) {
    Part parts[kCount];
    std::memcpy(parts, from, sizeof(from));
#pragma unroll
    for (int i = 0; i < kCount; ++i) reinterpret_cast<Part*>(to)[i] = parts[i];
  }
};

template <class Word>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Word* x, Index count, Word one, bool in_vectors, std::uint8_t* bits,
                std::uint8_t* binary) {
  if (!is_set(binary)) return;
  const Index index = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  const Index left = count - index * kElements;
  if (left <= 0) return;
  x += index * kElements;
  Word words[kElements];
  if (in_vectors && left >= kElements) {
    Words<Word>::read(x, words);
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) words[j] = j < left ? x[j] : Word(0);
  }
  unsigned byte = 0;
  Word other = 0;
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    const bool spike = words[j] == one;
    byte |= static_cast<unsigned>(spike) << j;
    other |= spike ? Word(0) : words[j];
  }
  bits[index] = static_cast<std::uint8_t>(byte);
  if (other) clear(binary);
}

// Sizes of what is unpacked. Where they are below 2^32 so are quotients, which then cost a third.
struct Sizes {
  Index steps, inner, count, bytes_of_step;
  bool narrow;       // count < 2^32
  bool whole_bytes;  // the eight elements of a thread are those of one byte

  __device__ __forceinline__ Index divide(Index a, Index b) const {
    return narrow
               ? static_cast<Index>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b))
               : a / b;
  }
};

template <class Word>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const std::uint8_t* bits, const Sizes sizes, Word one, bool in_vectors,
                  Word* to) {
  const Index first = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  const Index left = sizes.count - first;
  if (left <= 0) return;
  to += first;
  const Index row = sizes.divide(first, sizes.inner);
  Index within = first - row * sizes.inner;
  Index outer = sizes.divide(row, sizes.steps);
  Index step = row - outer * sizes.steps;
  Word words[kElements];
  if (sizes.whole_bytes && in_vectors && left >= kElements) {
    const unsigned byte =
        bits[step * sizes.bytes_of_step + (outer * sizes.inner + within) / kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) words[j] = byte >> j & 1u ? one : Word(0);
    Words<Word>::write(to, words);
    return;
  }
  const int count = left < kElements ? static_cast<int>(left) : kElements;
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const Index neuron = outer * sizes.inner + within;
    const unsigned byte = bits[step * sizes.bytes_of_step + neuron / 8];
    to[j] = byte >> (neuron % 8) & 1u ? one : Word(0);
    if (++within < sizes.inner) continue;
    within = 0;
    if (++step < sizes.steps) continue;
    step = 0;
    ++outer;
  }
}

Index blocks_for(Index count) { return ceil_div(count, Index(kThreads) * kElements); }

}  // namespace

void spike_pack(DType dtype, std::int64_t count, const void* x, std::uint8_t* bits,
                std::uint8_t* binary, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  check(cudaMemsetAsync(binary, 1, 1, static_cast<cudaStream_t>(queue.stream)), "setting a flag");
  if (count == 0) return;
  visit_dtype(dtype, [&](auto storage) {
    using Spike = SpikeWord<decltype(storage)>;
    using Word = typename Spike::type;
    const Word one = Spike::kOne;
    const bool in_vectors = aligned<char, kVectorBytes>(x);
    TRT_LAUNCH("spike_pack", pack_kernel<Word>, blocks_for(count), kThreads, 0, queue.stream,
               static_cast<const Word*>(x), count, one, in_vectors, bits, binary);
  });
}

void spike_unpack(DType dtype, const SpikeBits& a, void* to, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const Index count = a.outer * a.steps * a.inner;
  if (count == 0) return;
  const Sizes sizes{a.steps,
                    a.inner,
                    count,
                    ceil_div(a.outer * a.inner, 8),
                    count <= Index(0xffffffffu),
                    a.inner % kElements == 0 || a.inner == count};
  visit_dtype(dtype, [&](auto storage) {
    using Spike = SpikeWord<decltype(storage)>;
    using Word = typename Spike::type;
    const Word one = Spike::kOne;
    const bool in_vectors = aligned<char, kVectorBytes>(to);
    TRT_LAUNCH("spike_unpack", unpack_kernel<Word>, blocks_for(count), kThreads, 0, queue.stream,
               a.bits, sizes, one, in_vectors, static_cast<Word*>(to));
  });
}

}  // namespace cuda
}  // namespace trt
