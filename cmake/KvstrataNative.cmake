# Three functions, so that a package's CMakeLists.txt is a list of its files.

# kvstrata_library(NAME source...): a Python-free static library with the project's warnings and sanitizers.
function(kvstrata_library name)
  add_library(${name} STATIC ${ARGN})
  target_include_directories(${name} PUBLIC ${CMAKE_CURRENT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/csrc)
  target_compile_options(${name} PRIVATE -Wall -Wextra -Wpedantic -Werror -Wno-error=maybe-uninitialized)
  target_link_libraries(${name} PUBLIC Threads::Threads)
  if(KVSTRATA_SANITIZE)
    target_compile_options(${name} PUBLIC -fsanitize=${KVSTRATA_SANITIZE} -fno-omit-frame-pointer -g1 -O1)
    target_link_options(${name} PUBLIC -fsanitize=${KVSTRATA_SANITIZE})
  endif()
endfunction()

# kvstrata_module(PACKAGE bindings.cpp LIBRARY...): the extension module `<PACKAGE>/_native`.
function(kvstrata_module package source)
  if(NOT KVSTRATA_BINDINGS)
    return()
  endif()
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
  if(NOT nanobind_ROOT)
    execute_process(COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
                    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nanobind_ROOT)
  endif()
  find_package(nanobind CONFIG REQUIRED)
  set(target ${package}_native)
  nanobind_add_module(${target} NB_STATIC NB_DOMAIN ${package} ${source})
  set_target_properties(${target} PROPERTIES OUTPUT_NAME _native)
  target_link_libraries(${target} PRIVATE ${ARGN})
  install(TARGETS ${target} LIBRARY DESTINATION ${package})
endfunction()

# kvstrata_test(NAME source LIBRARY...): a doctest executable, run by ctest.
function(kvstrata_test name source)
  if(NOT KVSTRATA_TESTS)
    return()
  endif()
  find_path(DOCTEST_INCLUDE_DIR doctest/doctest.h REQUIRED)
  add_executable(${name} ${source})
  target_include_directories(${name} PRIVATE ${DOCTEST_INCLUDE_DIR})
  target_compile_definitions(${name} PRIVATE DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN)
  target_link_libraries(${name} PRIVATE ${ARGN})
  add_test(NAME ${name} COMMAND ${name})
endfunction()
