// `flexkv._native`: conversions only; `src/flexkv/_native.pyi` documents what Python sees.
#include <nanobind/nanobind.h>

void bind_cache(nanobind::module_& module);
void bind_transfer(nanobind::module_& module);

NB_MODULE(_native, module) {
  bind_cache(module);
  bind_transfer(module);
}
