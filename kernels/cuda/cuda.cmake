# The CUDA backend, where there is a compiler for it. strata_kernels links it and tells with STRATA_HAVE_CUDA.
#
#   -DSTRATA_CUDA=AUTO | ON | OFF      AUTO: when nvcc is found
#   -DSTRATA_CUDA=EMULATED             the kernels on this processor, for the tests (tests/emulator)
#   -DSTRATA_CUDA_ARCH="80;90a-real"   the GPUs to compile for, as CMAKE_CUDA_ARCHITECTURES takes them: 80 is the
#                                      general path, as machine code and as PTX from which newer GPUs' drivers make
#                                      theirs; 90a-real is 9.0. One alone halves what there is to compile, and a GPU
#                                      that is left out is refused by name
# No -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache: it hands out stale objects where only code inside an #if on __CUDA_ARCH__
# changed.
set(STRATA_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON, OFF or EMULATED")
set(STRATA_CUDA_ARCH "80;90a-real" CACHE STRING "GPU architectures, as CMAKE_CUDA_ARCHITECTURES takes them")
set(STRATA_HAVE_CUDA OFF)
set(STRATA_HAVE_NCCL OFF)
if(STRATA_CUDA STREQUAL OFF)
  return()
endif()
if(STRATA_CUDA STREQUAL EMULATED)
  include(tests/emulator/emulator.cmake)
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES ${STRATA_CUDA_ARCH})
if(NOT CMAKE_CUDA_COMPILER)
  find_program(STRATA_NVCC nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
  if(NOT STRATA_NVCC)
    if(STRATA_CUDA STREQUAL ON)
      message(FATAL_ERROR "STRATA_CUDA=ON, and no nvcc was found")
    endif()
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${STRATA_NVCC})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(STRATA_HAVE_CUDA ON)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -lineinfo -g1")

file(GLOB cuda_sources CONFIGURE_DEPENDS kernels/cuda/*.c kernels/cuda/*.cu)
add_library(strata_cuda STATIC ${cuda_sources})
set_target_properties(strata_cuda PROPERTIES CUDA_SEPARABLE_COMPILATION OFF)
# The C files keep the flags of every folder; what nvcc passes on to its host compiler is C++.
get_directory_property(c_flags COMPILE_OPTIONS)
list(JOIN c_flags "$<SEMICOLON>" c_flags)
string(CONCAT host_flags "-Wall,-Wextra,-Werror,-Wno-unused-parameter,-Wno-missing-field-initializers,"
       "-fno-strict-aliasing,-ffp-contract=off,-fvisibility=hidden")
set_property(TARGET strata_cuda PROPERTY COMPILE_OPTIONS
  "$<$<COMPILE_LANGUAGE:C>:${c_flags}>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings$<SEMICOLON>-Xcompiler=${host_flags}>")
target_include_directories(strata_cuda SYSTEM PUBLIC ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(strata_cuda PUBLIC strata_common CUDA::cudart_static CUDA::cublasLt)

# NCCL: links between GPUs. Without it stages meet over sockets.
find_path(STRATA_NCCL_INCLUDE nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ENV NCCL_HOME PATH_SUFFIXES include)
find_library(STRATA_NCCL_LIBRARY NAMES libnccl.so libnccl.so.2
             HINTS ${CUDAToolkit_LIBRARY_DIR} ENV NCCL_HOME PATH_SUFFIXES lib lib64)
if(STRATA_NCCL_INCLUDE AND STRATA_NCCL_LIBRARY)
  set(STRATA_HAVE_NCCL ON)
endif()
