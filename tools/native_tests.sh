#!/usr/bin/env bash
# Builds the native tests with one sanitizer set and runs them. Usage: tools/native_tests.sh BIN SANITIZERS
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?directory of cmake and ninja} sanitize=${2:?sanitizers, for example address,undefined}
build=build/native-${sanitize%%,*}
export PATH="$PWD/$bin:$PATH" UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
cmake -S . -B "$build" -G Ninja -DKVSTRATA_BINDINGS=OFF -DKVSTRATA_TESTS=ON -DKVSTRATA_SANITIZE="$sanitize" >/dev/null
cmake --build "$build"
# TSan maps its shadow memory at fixed addresses, which a kernel with many random address bits may have taken.
runner=(); [ "$sanitize" != thread ] || runner=(setarch "$(uname -m)" --addr-no-randomize)
"${runner[@]}" ctest --test-dir "$build" --output-on-failure --timeout 300
