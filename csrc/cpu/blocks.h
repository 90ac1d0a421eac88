// How the neurons of a layer are cut into blocks, by channels where something is given by channel,
// and how rows of a block are read and written.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../arguments.h"
#include "parallel.h"
#include "rows.h"

namespace trt {
inline namespace TRT_ISA {

using Index = std::int64_t;

// Sums are taken over granules: parts of the neurons whose borders depend on the shape alone, so
// that a block may be as wide as the number of threads asks and a sum still has one order.
constexpr Index kGranule = 128;

// Channels of up to so many neighbours share rows of a block, and the columns of a tile, at most:
// what is given for them is to stay in the second-level cache.
constexpr Index kSmallMap = 64;
constexpr Index kTileColumns = 4096;

// Runs of neighbouring neurons that share what is given by channel: those of one channel, or where
// channels are small, whole channels that are neighbours in memory (a tile).
struct Planes {
  explicit Planes(const LIFShape& shape)
      : shape(shape),
        tiles(are_tiles(shape)),
        channels(tiles ? tile_channels(shape) : 1),
        width(tiles ? channels * shape.channel_stride
                    : std::min(shape.channel_stride, shape.inner)),
        count(ceil_div(shape.channels, channels)),
        runs(shape.neurons() / (shape.channels * (tiles ? shape.channel_stride : width))),
        without_gap(tiles ? 1 : shape.channel_stride / width) {}

  static bool are_tiles(const LIFShape& shape) {
    return shape.channels > 1 && shape.channel_stride <= kSmallMap &&
           shape.inner >= shape.channels * shape.channel_stride;
  }
  Index first_channel(Index plane) const { return plane * channels; }
  Index channels_of(Index plane) const {
    return std::min(channels, shape.channels - first_channel(plane));
  }
  Index run_width(Index plane) const {
    return tiles ? channels_of(plane) * shape.channel_stride : width;
  }
  // The first neuron of a run.
  Index neuron(Index plane, Index run) const {
    if (tiles) return plane * width + run * shape.channels * shape.channel_stride;
    return (run / without_gap * shape.channels + plane) * shape.channel_stride +
           run % without_gap * width;
  }

  LIFShape shape;
  bool tiles;
  Index channels;  // of a plane, at most
  Index width;     // of a run, at most
  Index count, runs;
  Index without_gap;  // runs that follow one another

 private:
  // Tiles of one layer are about the same in width.
  static Index tile_channels(const LIFShape& shape) {
    const Index most = kTileColumns / shape.channel_stride;
    return ceil_div(shape.channels, ceil_div(shape.channels, most));
  }
};

// The columns of a block: `outers` runs of a plane, `inners` neurons of each from `inner` on.
// In memory these are `runs` stretches of `length`: a single one, where they follow one another.
struct Block {
  Index plane, outer, inner, outers, inners;
  Index runs, length;
  Index part;
  Index columns() const { return outers * inners; }
};

// Cuts the planes into blocks of about `width` columns, and the blocks of a plane into parts that
// a thread takes one after another.
class Blocks {
 public:
  Blocks(const LIFShape& shape, Index width)
      : planes(shape),
        granule_inners_(std::min(planes.width, kGranule)),
        granule_outers_(std::max<Index>(1, kGranule / planes.width)),
        granules_across_(ceil_div(planes.width, granule_inners_)),
        inners_(std::min(planes.width, width)),
        outers_(planes.tiles
                    ? std::max<Index>(1, width / planes.width)
                    : std::max<Index>(1, width / planes.width / granule_outers_) * granule_outers_),
        across_(ceil_div(planes.width, inners_)),
        down_(ceil_div(planes.runs, outers_)),
        of_part_(!planes.tiles ? 1
                               : across_ * std::max(ceil_div(kTilePart, outers_),
                                                    ceil_div(down_, kTileParts))),
        of_plane(across_ * down_),
        parts_of_plane(ceil_div(of_plane, of_part_)),
        granules_of_plane(planes.tiles
                              ? parts_of_plane
                              : granules_across_ * ceil_div(planes.runs, granule_outers_)) {}

  // Most columns of a block, and of what is given for those of a tile.
  Index width() const { return std::min(outers_, planes.runs) * inners_; }
  Index given_width() const { return planes.tiles ? std::max(width(), planes.width) : width(); }
  Index granules() const { return granules_of_plane * planes.count; }

  // f(block, its number) for the blocks of part `index` of `count` planes from `first` on. Parts
  // and blocks follow one another in memory as far as may be.
  template <class Function>
  void for_blocks(Index first, Index count, Index index, Function&& f) const {
    if (!planes.tiles) {
      const Index plane = first + index / across_ % count;
      return f(block(plane, index / across_ / count, index % across_), index);
    }
    const Index part = index % parts_of_plane, plane = index / parts_of_plane;
    const Index end = std::min(of_plane, (part + 1) * of_part_);
    for (Index i = part * of_part_; i < end; ++i) {
      const Block it = block(first + plane, i / across_, i % across_);
      if (it.inners > 0) f(it, plane * of_plane + i);
    }
  }

  // f(granule, its columns, the first of them) for every granule of the block, which a tile's block
  // shares with those of its part.
  template <class Function>
  void for_granules(const Block& block, Function&& f) const {
    if (planes.tiles) return f(block.part, block.columns(), Index(0));
    for (Index o = 0; o < block.outers; o += granule_outers_) {
      const Index outers = std::min(granule_outers_, block.outers - o);
      for (Index i = 0; i < block.inners; i += granule_inners_) {
        const Index inners = std::min(granule_inners_, block.inners - i);
        f(block.plane * granules_of_plane + (block.outer + o) / granule_outers_ * granules_across_ +
              (block.inner + i) / granule_inners_,
          outers * inners, o * block.inners + i);
      }
    }
  }

  const Planes planes;

 private:
  Block block(Index plane, Index down, Index across) const {
    const Index outer = down * outers_, inner = across * inners_;
    const Index outers = std::min(outers_, planes.runs - outer);
    const Index inners = std::min(inners_, planes.run_width(plane) - inner);
    const bool one = planes.tiles && planes.count == 1 && across_ == 1 && planes.shape.outer == 1;
    return {plane,
            outer,
            inner,
            outers,
            inners,
            one ? 1 : outers,
            one ? outers * inners : inners,
            plane * parts_of_plane + (down * across_ + across) / of_part_};
  }

  // Runs of a tile's part at least, and parts of a tile at most: enough of them for threads, few
  // enough that their sums are small.
  static constexpr Index kTilePart = 8, kTileParts = 64;
  const Index granule_inners_, granule_outers_, granules_across_;
  const Index inners_, outers_, across_, down_, of_part_;

 public:
  const Index of_plane, parts_of_plane, granules_of_plane;
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

// f(first column, its place in memory) for every stretch of a row.
template <class Storage, class Function>
void for_runs(const Rows<Storage>& rows, const Runs& runs, const Block& block, Index t,
              Function&& f) {
  for (Index o = 0; o < block.runs; ++o) f(o * block.length, rows.run(runs, o, t));
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

// Spikes, of which there are but two values, which are quicker to convert than others.
template <class F>
void copy_spikes(Index n, const F* __restrict__ from, F* __restrict__ to) {
  std::memcpy(to, from, n * sizeof(F));
}
template <class Storage, class F>
void copy_spikes(Index n, const F* __restrict__ from, Storage* __restrict__ to) {
  Storage one;
  store(&one, F(1));
  for (Index i = 0; i < n; ++i) to[i].bits = from[i] != F(0) ? one.bits : std::uint16_t(0);
}
template <class F, class Storage>
void store_spikes(const Rows<Storage>& to, const Runs& runs, const Block& block, Index t,
                  const F* row) {
  if (std::is_same<F, Storage>::value && block.runs == 1) return;
  for_runs(to, runs, block, t,
           [&](Index i, Storage* place) { copy_spikes(block.length, row + i, place); });
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
