// Errors of the native cache index.
#pragma once

#include <stdexcept>

namespace flexkv {

// The caller asked for what the structure cannot do in its state: a double free, a stale handle, a broken invariant.
// Nothing was changed. Becomes `flexkv.errors.CacheStateError` in Python.
class StateError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace flexkv
