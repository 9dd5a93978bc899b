// A first look at parameters and their states, before a plan is made: which of them are so ordinary that nothing is to
// be decided, so that Python's closer look (fastopt/routing.py, fastopt/plan.py), which has words for whatever it
// finds, is for the others alone. It takes 25 us a parameter, this a fraction of one.
//
// "No" means that it is worth a closer look. "Yes" must be what that would have found.
#pragma once

#include <string>
#include <utility>

#include "python.h"

namespace fastopt {

// For each of `params` a byte: not 0 if the parameter and its gradient are memory that every kernel takes, and the same
// for those that no backend treats differently. And whether they all are, and none shares memory with another.
std::pair<std::string, bool> find_ordinary(PyObject* params);

// For each parameter of `groups` a byte: 1 if all of its state is there, and is ordinary too. A group is a tuple: its
// parameters, the keys of its states and of its counters, and whether its device counts. `state` is optimizer.state.
std::string find_complete(PyObject* groups, PyObject* state);

}  // namespace fastopt
