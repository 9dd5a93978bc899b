// The list of compiled chains: the only place that says which combinations of stages exist as kernels.
// Every rule is compiled behind `scale` with and without the decays it admits, and with and without lookahead.
#pragma once

#include "chain.h"
#include "stages/adagrad.h"
#include "stages/adam.h"
#include "stages/gradient.h"
#include "stages/lookahead.h"
#include "stages/rmsprop.h"
#include "stages/sgd.h"

namespace fastopt {

template <class... Chains>
struct List {};

template <class... Lists>
struct Concat;
template <class... A>
struct Concat<List<A...>> {
  using type = List<A...>;
};
template <class... A, class... B, class... Rest>
struct Concat<List<A...>, List<B...>, Rest...> : Concat<List<A..., B...>, Rest...> {};

template <class... Chains>
using WithLookahead = List<Chains..., typename Chains::template then<lookahead>...>;

// A rule whose weight decay is a gradient term.
template <class... Rule>
using Coupled = WithLookahead<Chain<scale, Rule...>, Chain<scale, l2, Rule...>>;
// A rule that can also decay the parameter itself; without decay its factor is 1, which is exact.
template <class... Rule>
using Decoupled = WithLookahead<Chain<scale, shrink, Rule...>, Chain<scale, l2, Rule...>>;

// What happens to parameters without a gradient when slow weights synchronise.
using Pull = Chain<lookahead>;

using Chains = Concat<List<Pull>, Coupled<sgd>, Coupled<momentum, sgd>, Coupled<nesterov, sgd>,  //
                      Coupled<rmsprop>, Coupled<rmsprop_momentum>,                               //
                      Coupled<rmsprop_centered>, Coupled<rmsprop_centered_momentum>,             //
                      Coupled<adagrad>, Coupled<adamax>, WithLookahead<Chain<scale, moments>>,   //
                      Decoupled<adam>, Decoupled<amsgrad>, Decoupled<nadam>, Decoupled<radam>>   //
    ::type;

// Chains that also exist with a centralised gradient on a device (on the CPU all do).
using Centralised = WithLookahead<Chain<scale, moments>, Chain<scale, shrink, radam>>;

}  // namespace fastopt
