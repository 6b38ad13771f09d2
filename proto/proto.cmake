# Generates C from the .proto files. `string` fields become `bytes` first (the same on the wire): protobuf-c would cut
# strings at NUL and not check UTF-8; wire_*.c does both. Health and reflection come from Debian's grpc-proto.
find_program(PROTOC_C protoc-c REQUIRED)
find_program(PROTOC protoc REQUIRED)
set(gen ${CMAKE_BINARY_DIR}/gen)
set(grpc_proto_root /usr/share/grpc-proto)
set(proto_generated)
function(strata_proto root name) # root/name.proto -> gen/name.pb-c.{c,h}
  set(copy ${gen}/bytes/${name}.proto)
  get_filename_component(copy_dir ${copy} DIRECTORY)
  file(MAKE_DIRECTORY ${copy_dir})
  add_custom_command(
    OUTPUT ${gen}/${name}.pb-c.c ${gen}/${name}.pb-c.h
    COMMAND sed -E "s/^( *)((repeated|oneof [a-z_]+ \\{) )?string ([a-z_]+ = [0-9]+)/\\1\\2bytes \\4/"
            ${root}/${name}.proto > ${copy}
    COMMAND ${PROTOC_C} --proto_path=${gen}/bytes --c_out=${gen} ${copy}
    DEPENDS ${root}/${name}.proto VERBATIM)
  set(proto_generated ${proto_generated} ${gen}/${name}.pb-c.c PARENT_SCOPE)
endfunction()
file(MAKE_DIRECTORY ${gen})
strata_proto(${CMAKE_SOURCE_DIR}/proto strata/v1/inference)
strata_proto(${CMAKE_SOURCE_DIR}/proto strata/v1/pool)
strata_proto(${grpc_proto_root} grpc/health/v1/health)
strata_proto(${grpc_proto_root} grpc/reflection/v1/reflection)

# What reflection tells about: the descriptors of every service on the client port (the pool's is not one of them).
set(described strata/v1/inference.proto grpc/health/v1/health.proto grpc/reflection/v1/reflection.proto
    grpc/reflection/v1alpha/reflection.proto)
add_custom_command(
  OUTPUT ${gen}/wire_descriptors.c
  COMMAND ${PROTOC} --proto_path=${CMAKE_SOURCE_DIR}/proto --proto_path=${grpc_proto_root} --include_imports
          --descriptor_set_out=${gen}/wire_descriptors.pb ${described}
  COMMAND ${CMAKE_COMMAND} -DINPUT=${gen}/wire_descriptors.pb -DOUTPUT=${gen}/wire_descriptors.c
          -DNAME=wire_descriptors -P ${CMAKE_SOURCE_DIR}/proto/embed.cmake
  DEPENDS ${CMAKE_SOURCE_DIR}/proto/strata/v1/inference.proto ${CMAKE_SOURCE_DIR}/proto/embed.cmake VERBATIM)
list(APPEND proto_generated ${gen}/wire_descriptors.c)

set_source_files_properties(${proto_generated} PROPERTIES COMPILE_OPTIONS "-w")
file(GLOB proto_sources CONFIGURE_DEPENDS proto/*.c)
add_library(strata_proto STATIC ${proto_sources} ${proto_generated})
target_include_directories(strata_proto SYSTEM PRIVATE ${gen})
target_link_libraries(strata_proto PUBLIC strata_common PRIVATE dep_protobufc)
