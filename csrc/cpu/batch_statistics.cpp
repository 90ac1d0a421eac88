// Mean and deviation of every channel over everything else, in one pass.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace trt {
inline namespace TRT_ISA {
namespace {

using Index = std::int64_t;

// Channels that are summed together, so that memory is read in longer stretches than one channel's,
// and elements of a part, which is what a thread takes at a time. Parts depend on the shape alone.
constexpr Index kTile = 512, kMostLanes = 32;
constexpr Index kStretch = 4096;
constexpr Index kPart = 64 * 1024;
constexpr Index kSerial = serial_below(kPart);

struct Moments {
  double sum = 0, squares = 0;
};

// Sums of one channel in independent lanes, which hide the latency of an addition.
class Lanes {
 public:
  // Adds a run, each number less `shift`.
  template <class Storage>
  void add(Index n, const Storage* __restrict__ x, double shift) {
    Index i = 0;
    for (; i + kCount <= n; i += kCount) {
      for (Index lane = 0; lane < kCount; ++lane) add_one(lane, load(x[i + lane]) - shift);
    }
    for (Index lane = 0; i + lane < n; ++lane) add_one(lane, load(x[i + lane]) - shift);
  }
  Moments total() const {
    Moments total;
    for (Index lane = 0; lane < kCount; ++lane) {
      total.sum += sums_[lane];
      total.squares += squares_[lane];
    }
    return total;
  }

 private:
  static constexpr Index kCount = 16;
  void add_one(Index lane, double d) {
    sums_[lane] += d;
    squares_[lane] += d * d;
  }
  double sums_[kCount] = {}, squares_[kCount] = {};
};

template <class Storage>
void statistics(const Statistics& a, int threads) {
  using F = State<Storage>;
  const Storage* x = static_cast<const Storage*>(a.x);
  const bool tiles = a.within == 1;
  const Index together =
      tiles ? kTile : std::min(kMostLanes, std::max<Index>(1, kStretch / a.within));
  const Index width = std::min(a.channels, together);  // channels of a part
  const Index across = ceil_div(a.channels, width);
  const Index runs_of_part = std::max<Index>(1, kPart / (width * a.within));
  const Index parts = ceil_div(a.before, runs_of_part);
  std::vector<Moments> partial(parts * across * width);

  parallel_for(parts * across, a.before * a.channels * a.within < kSerial ? 1 : threads,
               [&](Index index, int) {
                 const Index part = index % parts, tile = index / parts;
                 const Index first = tile * width, n = std::min(width, a.channels - first);
                 const Index begin = part * runs_of_part;
                 const Index end = std::min(a.before, begin + runs_of_part);
                 Moments* to = &partial[(tile * parts + part) * width];
                 if (!tiles) {
                   double shifts[kMostLanes];
                   Lanes lanes[kMostLanes];
                   for (Index j = 0; j < n; ++j) shifts[j] = load(x[(first + j) * a.within]);
                   for (Index run = begin; run < end; ++run) {
                     const Storage* row = x + (run * a.channels + first) * a.within;
                     for (Index j = 0; j < n; ++j) {
                       lanes[j].add(a.within, row + j * a.within, shifts[j]);
                     }
                   }
                   for (Index j = 0; j < n; ++j) to[j] = lanes[j].total();
                   return;
                 }
                 double shifts[kTile], sums[kTile] = {}, squares[kTile] = {};
                 for (Index j = 0; j < n; ++j) shifts[j] = load(x[first + j]);
                 for (Index run = begin; run < end; ++run) {
                   const Storage* row = x + run * a.channels + first;
                   for (Index j = 0; j < n; ++j) {
                     const double d = load(row[j]) - shifts[j];
                     sums[j] += d;
                     squares[j] += d * d;
                   }
                 }
                 for (Index j = 0; j < n; ++j) to[j] = {sums[j], squares[j]};
               });

  for (Index channel = 0; channel < a.channels; ++channel) {
    Moments total;
    for (Index part = 0; part < parts; ++part) {
      const Moments& m = partial[(channel / width * parts + part) * width + channel % width];
      total.sum += m.sum;
      total.squares += m.squares;
    }
    write_statistics<F>(a, channel, load(x[channel * a.within]), total.sum, total.squares);
  }
}

}  // namespace

void batch_statistics(const Statistics& a, int threads) {
  if (a.before * a.within == 0) return;
  visit_dtype(a.dtype, [&](auto storage) { statistics<decltype(storage)>(a, threads); });
}

}  // namespace TRT_ISA
}  // namespace trt
