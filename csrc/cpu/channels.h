// What is given by channel, as the rows of a block need it, and sums by channel.
//
// It is a constant of a block whose neurons are of one channel; where channels are columns, it is
// an array beside the rows.
#pragma once

#include <algorithm>
#include <vector>

#include "blocks.h"

namespace trt {
inline namespace TRT_ISA {

// The neurons of a block's columns.
template <class F>
struct OneNeuron {
  Neuron<F> value;
  const Neuron<F>& operator[](Index) const { return value; }
};
template <class F>
struct NeuronRow {
  const F* __restrict__ factor, * __restrict__ threshold, * __restrict__ v_reset, * __restrict__ fires_above;
  Neuron<F> operator[](Index i) const {
    return {factor[i], factor[i], threshold[i], v_reset[i], fires_above[i]};
  }
};

// The normalisation of a block's columns, and the means that its backward pass subtracts.
template <class F>
struct OneNorm {
  Norm<F> value;
  F mean_dzx, mean_dz;

  OneNorm from(Index) const { return *this; }
  const Norm<F>& operator[](Index) const { return value; }
  F gradient(Index, F xhat, F dz, F times) const {
    return value.gradient(xhat, dz, times * mean_dzx, times * mean_dz);
  }
};
template <class F>
struct NormRow {
  const F *mean, *rest, *inverse, *a, *b, *mean_dzx, *mean_dz;

  NormRow from(Index i) const {
    return {mean + i, rest + i, inverse + i, a + i, b + i, mean_dzx + i, mean_dz + i};
  }
  Norm<F> operator[](Index i) const { return {mean[i], rest[i], inverse[i], a[i], b[i]}; }
  F gradient(Index i, F xhat, F dz, F times) const {
    return (*this)[i].gradient(xhat, dz, times * mean_dzx[i], times * mean_dz[i]);
  }
};

// A value of every column: the same.
template <class F>
struct Same {
  F value;
  F operator[](Index) const { return value; }
};

// What is given by channel, for the planes of a layer.
template <class F>
class Given {
 public:
  // Of neurons, of the norm, and the gains of a step.
  static constexpr Index kNeuronRows = 4, kNormRows = 7, kRows = kNeuronRows + kNormRows + 1;

  Given(const LIFSettings& settings, const LIFShape& shape, const LIFChannels& by_channel,
        const F* means, const Blocks& blocks)
      : width(blocks.given_width()),
        settings_(settings),
        channels_(shape.channels),
        by_channel_(by_channel),
        means_(means),
        blocks_(blocks),
        one_(make_neuron<F>(settings)) {}

  // Whether neurons, or the normalisation, differ from column to column.
  bool neurons_differ() const { return blocks_.planes.tiles && by_channel_.neuron; }
  bool normalises() const { return by_channel_.stats; }
  bool norms_differ() const { return blocks_.planes.tiles && by_channel_.stats; }
  bool has_means() const { return means_; }

  // Of a channel.
  Neuron<F> neuron(Index channel) const {
    if (!by_channel_.neuron) return one_;
    return make_neuron(static_cast<const F*>(by_channel_.neuron), channel, channels_,
                       settings_.fire_at_threshold);
  }
  OneNorm<F> norm(Index channel) const {
    return {make_norm<F>(by_channel_, channel, channels_, static_cast<F>(settings_.scale)),
            means_ ? means_[channel] : F(0), means_ ? means_[channels_ + channel] : F(0)};
  }
  F gain(Index t, Index channel) const {
    const F* gains = static_cast<const F*>(by_channel_.gains);
    if (!gains) return F(1);
    return by_channel_.gains_by_channel ? gains[t * channels_ + channel] : gains[t];
  }

  // Fills the rows of a tile's columns, which are `width` long.
  void fill(Index plane, F* rows) const {
    if (neurons_differ()) {
      spread<kNeuronRows>(plane, rows, [&](Index channel, F* values) {
        const Neuron<F> n = neuron(channel);
        const F of_neuron[] = {n.decay, n.threshold, n.v_reset, n.fires_above};
        std::copy_n(of_neuron, kNeuronRows, values);
      });
    }
    if (norms_differ()) {
      spread<kNormRows>(plane, rows + kNeuronRows * width, [&](Index channel, F* values) {
        const OneNorm<F> n = norm(channel);
        const F of_norm[] = {n.value.mean, n.value.rest, n.value.inverse, n.value.a,
                             n.value.b,    n.mean_dzx,   n.mean_dz};
        std::copy_n(of_norm, kNormRows, values);
      });
    }
  }
  // Fills a row of the gains of a step, for the columns of a tile's block.
  void fill_gains(Index t, const Block& block, F* row) const {
    const Planes& planes = blocks_.planes;
    const Index each = planes.shape.channel_stride, first = planes.first_channel(block.plane);
    for (Index i = 0; i < block.inners;) {
      const Index channel = (block.inner + i) / each;
      const Index end = std::min(block.inners, (channel + 1) * each - block.inner);
      std::fill(row + i, row + end, gain(t, first + channel));
      i = end;
    }
    repeat(row, block.inners, block.columns());
  }
  NeuronRow<F> neurons_of(const F* rows) const {
    return {rows, rows + width, rows + 2 * width, rows + 3 * width};
  }
  NormRow<F> norms_of(const F* rows) const {
    const auto row = [&](Index i) { return rows + (kNeuronRows + i) * width; };
    return {row(0), row(1), row(2), row(3), row(4), row(5), row(6)};
  }
  F* gains_of(F* rows) const { return rows + (kRows - 1) * width; }

  const Index width;

 private:
  // Rows of what f(channel, values) gives of every channel, over and over to the end of a row.
  template <Index kCount, class Function>
  void spread(Index plane, F* rows, Function&& f) const {
    const Planes& planes = blocks_.planes;
    const Index each = planes.shape.channel_stride, tile = planes.run_width(plane);
    for (Index j = 0; j < planes.channels_of(plane); ++j) {
      F values[kCount];
      f(planes.first_channel(plane) + j, values);
      for (Index row = 0; row < kCount; ++row) {
        std::fill_n(rows + row * width + j * each, each, values[row]);
      }
    }
    for (Index row = 0; row < kCount; ++row) repeat(rows + row * width, tile, width);
  }
  static void repeat(F* row, Index period, Index columns) {
    for (Index i = period; i < columns; i += period) {
      std::copy_n(row, std::min(period, columns - i), row + i);
    }
  }

  const LIFSettings& settings_;
  const Index channels_;
  const LIFChannels& by_channel_;
  const F* means_;
  const Blocks& blocks_;
  Neuron<F> one_;
};

// A thread's block with what is given for it by channel. Rows of it stay filled from block to block
// of a tile.
template <class F>
class Local {
 public:
  // `rows` has Given::kRows rows of its width; `filled` tells what they are filled for.
  Local(const Given<F>& given, F* rows, Index& filled)
      : given_(given), rows_(rows), filled_(filled) {}

  void enter(const Block& block) {
    block_ = block;
    if (!given_.neurons_differ()) neuron_ = given_.neuron(block.plane);
    if (given_.normalises() && !given_.norms_differ()) norm_ = given_.norm(block.plane);
    const Index wanted = 2 * block.plane + given_.has_means();
    if ((given_.neurons_differ() || given_.norms_differ()) && filled_ != wanted) {
      given_.fill(block.plane, rows_);
      filled_ = wanted;
    }
  }
  // f(neurons) with those of the block's columns.
  template <class Function>
  void visit_neurons(Function&& f) const {
    if (given_.neurons_differ()) {
      f(given_.neurons_of(rows_ + block_.inner));
    } else {
      f(OneNeuron<F>{neuron_});
    }
  }
  template <class Function>
  void visit_norm(Function&& f) const {
    if (given_.norms_differ()) {
      f(given_.norms_of(rows_ + block_.inner));
    } else {
      f(norm_);
    }
  }
  // The gains of step t.
  template <class Function>
  void visit_gain(Index t, Function&& f) const {
    if (given_.norms_differ()) {
      F* gains = given_.gains_of(rows_);
      given_.fill_gains(t, block_, gains);
      f(static_cast<const F*>(gains));
    } else {
      f(Same<F>{given_.gain(t, block_.plane)});
    }
  }

 private:
  const Given<F>& given_;
  F* const rows_;
  Index& filled_;
  Block block_{};
  Neuron<F> neuron_{};
  OneNorm<F> norm_{};
};

// Step t of the normalised input of a block.
template <class F, class Storage, class Norms>
void normalise_loop(Index n, const Storage* __restrict__ x, F* __restrict__ y, const Norms norms) {
#pragma GCC ivdep
  for (Index i = 0; i < n; ++i) y[i] = norms[i](load(x[i]));
}
template <class F, class Gain>
void gain_loop(Index n, F* __restrict__ y, const Gain gain) {
  for (Index i = 0; i < n; ++i) y[i] = y[i] * gain[i];
}
template <class F, class Storage>
void normalise_row(const Local<F>& local, bool gains, const Rows<const Storage>& x,
                   const Runs& runs, const Block& block, Index t, F* y) {
  local.visit_norm([&](const auto& norms) {
    for_runs(x, runs, block, t, [&](Index i, const Storage* from) {
      normalise_loop(block.length, from, y + i, norms.from(i));
    });
  });
  if (gains) local.visit_gain(t, [&](const auto& gain) { gain_loop(block.columns(), y, gain); });
}

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
    const Index inners = block.inners;
    blocks_.for_granules(block, [&](Index granule, Index count, Index first) {
      double* sum = partial_.data() + (row * blocks_.granules() + granule) * each_;
      if (!blocks_.planes.tiles) {
        *sum += sum_row(count, columns + first);
        return;
      }
      sum += block.inner;
      for (const F* from = columns; from != columns + count; from += inners) {
        for (Index i = 0; i < inners; ++i) sum[i] += from[i];
      }
    });
  }

  double total(Index row, Index channel) const {
    const Planes& planes = blocks_.planes;
    const Index plane = channel / planes.channels, within = channel % planes.channels;
    const Index columns = planes.tiles ? planes.shape.channel_stride : 1;
    const double* from = partial_.data() +
                         (row * blocks_.granules() + plane * blocks_.granules_of_plane) * each_ +
                         within * columns;
    double sum = 0;
    for (Index g = 0; g < blocks_.granules_of_plane; ++g, from += each_) {
      for (Index i = 0; i < columns; ++i) sum += from[i];
    }
    return sum;
  }

 private:
  const Blocks& blocks_;
  const Index each_;
  std::vector<double> partial_;
};

}  // namespace TRT_ISA
}  // namespace trt
