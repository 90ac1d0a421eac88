// How the neurons of a layer are cut into blocks, by channels where something is given by channel,
// and how rows of a block are read, written and summed.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "parallel.h"
#include "rows.h"

namespace trt {
inline namespace TRT_ISA {

using Index = std::int64_t;

// Sums are taken over granules: parts of a block whose borders depend on the shape alone, so that a
// block may be as wide as the number of threads asks and a sum still has one order.
constexpr Index kGranule = 128;

// Runs of neighbouring neurons that share what is given by channel: those of one channel, or of up
// to kGranule channels that are neighbours in memory (a tile).
struct Planes {
  explicit Planes(const LIFShape& shape)
      : shape(shape),
        tiles(shape.channels > 1 && shape.channel_stride == 1 && shape.inner >= shape.channels),
        width(tiles ? std::min(shape.channels, kGranule)
                    : std::min(shape.channel_stride, shape.inner)),
        count(tiles ? ceil_div(shape.channels, width) : shape.channels),
        runs(shape.neurons() / (tiles ? shape.channels : shape.channels * width)),
        without_gap(tiles ? 1 : shape.channel_stride / width) {}

  Index first_channel(Index plane) const { return tiles ? plane * width : plane; }
  Index run_width(Index plane) const {
    return tiles ? std::min(width, shape.channels - plane * width) : width;
  }
  // The first neuron of a run.
  Index neuron(Index plane, Index run) const {
    if (tiles) return plane * width + run * shape.channels;
    return (run / without_gap * shape.channels + plane) * shape.channel_stride +
           run % without_gap * width;
  }

  LIFShape shape;
  bool tiles;
  Index width;  // of a run, at most
  Index count, runs;
  Index without_gap;  // runs that follow one another
};

// The columns of a block: `outers` runs of a plane, `inners` neurons of each from `inner` on.
// In memory these are `runs` stretches of `length`: a single one, where they follow one another.
struct Block {
  Index plane, outer, inner, outers, inners;
  Index runs, length;
  Index columns() const { return outers * inners; }
};

// Cuts the planes into blocks of about `width` columns.
class Blocks {
 public:
  Blocks(const LIFShape& shape, Index width)
      : planes(shape),
        granule_inners_(std::min(planes.width, kGranule)),
        granule_outers_(
            std::max<Index>(1, (planes.tiles ? kTileGranule : kGranule) / planes.width)),
        granules_across_(ceil_div(planes.width, granule_inners_)),
        inners_(std::min(planes.width, width)),
        outers_(std::max<Index>(1, width / planes.width / granule_outers_) * granule_outers_),
        across_(ceil_div(planes.width, inners_)),
        of_plane(across_ * ceil_div(planes.runs, outers_)),
        granules_of_plane(granules_across_ * ceil_div(planes.runs, granule_outers_)) {}

  Index count() const { return of_plane * planes.count; }
  // Most columns of a block.
  Index width() const { return std::min(outers_, planes.runs) * inners_; }
  Index granules() const { return granules_of_plane * planes.count; }

  Block operator[](Index block) const {
    const Index plane = block / of_plane, within = block % of_plane;
    const Index outer = within / across_ * outers_, inner = within % across_ * inners_;
    const Index outers = std::min(outers_, planes.runs - outer);
    const Index inners = std::min(inners_, planes.run_width(plane) - inner);
    const bool one = planes.tiles && planes.count == 1 && planes.shape.outer == 1;
    return {plane, outer, inner, outers, inners, one ? 1 : outers, one ? outers * inners : inners};
  }

  // Block `index` of those of planes first .. first + count - 1, in an order that goes through
  // memory as steadily as may be: neighbouring planes first.
  Block in_order(Index index, Index first, Index count) const {
    return (*this)[(first + index % count) * of_plane + index / count];
  }

  // f(granule, its outers, its inners, its first column) for every granule of the block.
  template <class Function>
  void for_granules(const Block& block, Function&& f) const {
    for (Index o = 0; o < block.outers; o += granule_outers_) {
      const Index outers = std::min(granule_outers_, block.outers - o);
      for (Index i = 0; i < block.inners; i += granule_inners_) {
        const Index inners = std::min(granule_inners_, block.inners - i);
        f(block.plane * granules_of_plane + (block.outer + o) / granule_outers_ * granules_across_ +
              (block.inner + i) / granule_inners_,
          outers, inners, o * block.inners + i);
      }
    }
  }

  const Planes planes;

 private:
  // A tile keeps a sum for each of its columns, so its granules are longer.
  static constexpr Index kTileGranule = 4 * kGranule;
  const Index granule_inners_, granule_outers_, granules_across_;
  const Index inners_, outers_, across_;

 public:
  const Index of_plane, granules_of_plane;
};

// Sums of rows by channel: a number for every granule, or in a tile for every column of it.
class ChannelSums {
 public:
  ChannelSums(const Blocks& blocks, Index rows)
      : blocks_(blocks),
        each_(blocks.planes.tiles ? blocks.planes.width : 1),
        partial_(rows * blocks.granules() * each_) {}

  // Adds the columns of a block to a row.
  template <class F>
  void add(const Block& block, Index row, const F* columns) {
    blocks_.for_granules(block, [&](Index granule, Index outers, Index inners, Index first) {
      double* sum = partial_.data() + (row * blocks_.granules() + granule) * each_;
      if (!blocks_.planes.tiles) {
        *sum += sum_row(outers * inners, columns + first);
        return;
      }
      for (Index o = 0; o < outers; ++o) {
        const F* from = columns + first + o * block.inners;
        for (Index i = 0; i < inners; ++i) sum[i] += from[i];
      }
    });
  }

  double total(Index row, Index channel) const {
    const Planes& planes = blocks_.planes;
    const Index plane = planes.tiles ? channel / planes.width : channel;
    const Index column = planes.tiles ? channel % planes.width : 0;
    const Index first = row * blocks_.granules() + plane * blocks_.granules_of_plane;
    double sum = 0;
    for (Index g = 0; g < blocks_.granules_of_plane; ++g) {
      sum += partial_[(first + g) * each_ + column];
    }
    return sum;
  }

 private:
  const Blocks& blocks_;
  const Index each_;
  std::vector<double> partial_;
};

// Where the runs of a block begin, in a state and in a sequence at step 0.
struct Runs {
  Index *state, *sequence;

  void find(const Blocks& blocks, const Block& block) const {
    const LIFShape& shape = blocks.planes.shape;
    for (Index o = 0; o < block.runs; ++o) {
      state[o] = blocks.planes.neuron(block.plane, block.outer + o) + block.inner;
      const Index outer = shape.outer == 1 ? 0 : state[o] / shape.inner;
      sequence[o] = state[o] + outer * (shape.steps - 1) * shape.inner;
    }
  }
};

// A dense tensor, read and written by rows of a block: a sequence, its timesteps `stride` apart, or
// a state.
template <class Storage>
struct Rows {
  Storage* data;
  Index* Runs::* begins;
  Index stride;

  Storage* run(const Runs& runs, Index outer, Index t) const {
    return data + (runs.*begins)[outer] + t * stride;
  }
};

template <class Storage>
Rows<Storage> sequence_rows(Storage* data, const LIFShape& shape) {
  return {data, &Runs::sequence, shape.inner};
}
template <class Storage>
Rows<Storage> state_rows(Storage* data) {
  return {data, &Runs::state, 0};
}

// Copies a stretch of memory, converting it where the types differ.
template <class To, class From>
void copy_run(Index n, const From* __restrict__ from, To* __restrict__ to) {
  if constexpr (std::is_same<To, From>::value) {
    std::memcpy(to, from, n * sizeof(To));
  } else if constexpr (std::is_same<To, State<From>>::value) {
    for (Index i = 0; i < n; ++i) to[i] = load(from[i]);
  } else {
    for (Index i = 0; i < n; ++i) store(&to[i], from[i]);
  }
}

// The row as an array of F: in place, or converted into `buffer`.
template <class F, class Storage>
const F* load_row(const Rows<const Storage>& from, const Runs& runs, const Block& block, Index t,
                  F* buffer) {
  if constexpr (std::is_same<F, Storage>::value) {
    if (block.runs == 1) return from.run(runs, 0, t);
  }
  for (Index o = 0; o < block.runs; ++o) {
    copy_run(block.length, from.run(runs, o, t), buffer + o * block.length);
  }
  return buffer;
}

// Where to compute a row to be stored: in place, or in `buffer` for `store_row`.
template <class F, class Storage>
F* open_row(const Rows<Storage>& to, const Runs& runs, const Block& block, Index t, F* buffer) {
  if constexpr (std::is_same<F, Storage>::value) {
    if (block.runs == 1) return to.run(runs, 0, t);
  }
  return buffer;
}

template <class F, class Storage>
void copy_row(const Rows<Storage>& to, const Runs& runs, const Block& block, Index t,
              const F* row) {
  for (Index o = 0; o < block.runs; ++o) {
    copy_run(block.length, row + o * block.length, to.run(runs, o, t));
  }
}

// Ends what `open_row` began.
template <class F, class Storage>
void store_row(const Rows<Storage>& to, const Runs& runs, const Block& block, Index t,
               const F* row) {
  if (std::is_same<F, Storage>::value && block.runs == 1) return;
  copy_row(to, runs, block, t, row);
}

// Fills `row` from `from`, or with zeros where there is no such tensor.
template <class F>
void fill_row(const Rows<const F>& from, const Runs& runs, const Block& block, F* row) {
  const Index n = block.columns();
  if (!from.data) {
    std::fill_n(row, n, F(0));
  } else if (const F* loaded = load_row(from, runs, block, 0, row); loaded != row) {
    std::copy_n(loaded, n, row);
  }
}

}  // namespace TRT_ISA
}  // namespace trt
