// Names to positions: the only place where a choice is looked up by its name.
#include <stdexcept>

#include "math/neuron.h"
#include "math/regularizer.h"
#include "math/surrogate.h"
#include "ops.h"

namespace trt {
namespace {

template <class List>
int find(const char* what, const std::string& name) {
  const int position = find_kind(List(), name.c_str());
  if (position < 0) throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
  return position;
}

}  // namespace

LIFSettings LIFSettings::make(const std::string& charge, const std::string& reset,
                              const std::string& surrogate, const std::string& phi) {
  LIFSettings settings{};
  settings.charge = find<Charges>("charge", charge);
  settings.reset = find<Resets>("reset", reset);
  settings.surrogate = find<Surrogates>("surrogate", surrogate);
  settings.penalize_spike = phi == "spike";
  settings.potential = phi.empty() || settings.penalize_spike ? -1 : find<Potentials>("phi", phi);
  return settings;
}

}  // namespace trt
