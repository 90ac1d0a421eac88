// Lists of interchangeable pieces (surrogates, resets, charges), chosen by name once per call.
#pragma once

#include "platform.h"

namespace trt {
inline namespace TRT_ISA {

template <class... Kinds>
struct KindList {};

// Position of a name in a list, -1 if it is not there. Positions never leave one build of csrc/.
inline int find_kind(KindList<>, const char*, int) { return -1; }
template <class First, class... Rest>
int find_kind(KindList<First, Rest...>, const char* name, int position = 0) {
  return std::strcmp(First::name, name) == 0 ? position
                                             : find_kind(KindList<Rest...>(), name, position + 1);
}

// Position of a type in a list.
template <class Kind, class... Rest>
constexpr int position_of(KindList<Kind, Rest...>, Kind) {
  return 0;
}
template <class First, class... Rest, class Kind>
constexpr int position_of(KindList<First, Rest...>, Kind) {
  return 1 + position_of(KindList<Rest...>(), Kind());
}

// Calls f(Kind()) for the kind at `position`: a uniform branch outside the loops.
template <class Last, class Function>
TRT_HD void visit_kind(KindList<Last>, int, Function&& f) {
  f(Last());
}
template <class First, class Second, class... Rest, class Function>
TRT_HD void visit_kind(KindList<First, Second, Rest...>, int position, Function&& f) {
  if (position == 0) {
    f(First());
  } else {
    visit_kind(KindList<Second, Rest...>(), position - 1, f);
  }
}

}  // namespace TRT_ISA
}  // namespace trt
