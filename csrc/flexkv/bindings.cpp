// `flexkv._native`: conversions only; `src/flexkv/_native.pyi` documents what Python sees.
#include <nanobind/nanobind.h>

namespace flexkv {
void bind_cache(nanobind::module_& module);
void bind_ssd(nanobind::module_& module);
void bind_transfer(nanobind::module_& module);
}  // namespace flexkv

NB_MODULE(_native, module) {
  // Engines exit without tearing everything down; that is not a leak worth a page on their users' terminal.
  nanobind::set_leak_warnings(false);
  flexkv::bind_cache(module);
  flexkv::bind_transfer(module);
  flexkv::bind_ssd(module);
}
