// Letting go of gradients, as zero_grad() does between two steps. In Python that takes longer than the step itself of
// as many small tensors: asking for p.grad makes a Python object of it first.
#pragma once

#include <vector>

#include "python.h"

namespace fastopt {

// Of the parameters of all groups those that are not plain torch tensors, and so have to be told in Python; the others
// have no gradient afterwards.
std::vector<Ref> drop_gradients(PyObject* groups);

}  // namespace fastopt
