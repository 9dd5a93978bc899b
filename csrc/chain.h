// A chain applies stages one after the other to the same element: the whole update of a parameter in registers.
// The C++ twin of fastopt/chain.py; drivers are templates over a chain and never name an optimizer.
#pragma once

#include <string>

#include "stages/ops.h"

namespace fastopt {

inline constexpr int max_slots = 4;          // state tensors of the longest chain
inline constexpr int max_coefficients = 16;  // coefficients of the longest chain

constexpr int count_words(const char* text) {
  int words = 0;
  for (bool inside = false; *text; ++text) {
    bool letter = *text != ' ';
    words += letter && !inside;
    inside = letter;
  }
  return words;
}

template <class Stage>
inline constexpr int slots_of = count_words(Stage::state);
template <class Stage>
inline constexpr int coefficients_of = count_words(Stage::coefficients);

template <class... Stages>
struct Chain {
  static constexpr int slots = (slots_of<Stages> + ... + 0);
  static constexpr int coefficients = (coefficients_of<Stages> + ... + 0);
  static_assert(slots <= max_slots && coefficients <= max_coefficients);

  template <class Extra>
  using then = Chain<Stages..., Extra>;

  static std::string name() {
    std::string text;
    ((text += (text.empty() ? "" : "+") + std::string(Stages::name)), ...);
    return text;
  }

  // s holds the state of all stages, c their coefficients, each concatenated in stage order.
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T* s, const T* c) {
    (apply_stage<Stages>(p, g, s, c), ...);
  }

 private:
  template <class Stage, class T>
  FASTOPT_HD static void apply_stage(T& p, T& g, T*& s, const T*& c) {
    using Row = const T[coefficients_of<Stage>];
    const Row& row = *reinterpret_cast<Row*>(c);
    if constexpr (slots_of<Stage> > 0) {
      using State = T[slots_of<Stage>];
      Stage::apply(p, g, *reinterpret_cast<State*>(s), row);
      s += slots_of<Stage>;
    } else {
      Stage::apply(p, g, row);
    }
    c += coefficients_of<Stage>;
  }
};

}  // namespace fastopt
