# The CUDA backend for g++ and the emulator (emulator.h): what kernels/cuda/cuda.cmake builds where STRATA_CUDA is
# EMULATED.
enable_language(CXX)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_EXTENSIONS ON)
set(STRATA_HAVE_CUDA ON)
file(GLOB cuda_sources CONFIGURE_DEPENDS kernels/cuda/*.c kernels/cuda/*.cu)
file(GLOB kernel_files CONFIGURE_DEPENDS kernels/cuda/*.cu)
file(GLOB emulator_sources CONFIGURE_DEPENDS tests/emulator/*.cpp)
add_library(strata_cuda STATIC ${cuda_sources} ${emulator_sources})
set_source_files_properties(${kernel_files} PROPERTIES LANGUAGE CXX
  COMPILE_OPTIONS "-x;c++;-include;${CMAKE_SOURCE_DIR}/tests/emulator/instructions.h")
set_source_files_properties(tests/emulator/emulator_products.cpp PROPERTIES COMPILE_OPTIONS -O3)
# Halves and fused products are the processor's own: it is one of the last ten years.
set(kernel_options -O1 -g1 -march=x86-64-v3 -Wall -Wextra -Werror -Wno-unused-parameter -Wno-unknown-pragmas
    -Wno-sign-compare -Wno-maybe-uninitialized -Wno-missing-field-initializers -fno-strict-aliasing -ffp-contract=off
    -fno-extern-tls-init)
get_directory_property(c_flags COMPILE_OPTIONS)
set_property(TARGET strata_cuda PROPERTY COMPILE_OPTIONS
  "$<$<COMPILE_LANGUAGE:CXX>:${kernel_options}>" "$<$<COMPILE_LANGUAGE:C>:${c_flags}>")
target_include_directories(strata_cuda SYSTEM PUBLIC tests/emulator)
target_link_libraries(strata_cuda PUBLIC strata_common stdc++)
