# Generates C from the .proto files. `string` fields become `bytes` first (the same on the wire): protobuf-c would cut
# strings at NUL and not check UTF-8; wire_*.c does both. Health and reflection come from Debian's grpc-proto.
find_program(PROTOC_C protoc-c REQUIRED)
find_program(PROTOC protoc REQUIRED)
set(gen ${CMAKE_BINARY_DIR}/gen)
set(grpc_proto_root /usr/share/grpc-proto)
set(proto_generated)
function(strata_proto root name prefix)
  # root/name.proto -> gen/prefix/name.pb-c.{c,h}; `prefix` renames the package directory where two would collide.
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
strata_proto(${CMAKE_SOURCE_DIR}/proto strata/v1/inference "")
strata_proto(${CMAKE_SOURCE_DIR}/proto strata/v1/pool "")
strata_proto(${grpc_proto_root} grpc/health/v1/health "")
strata_proto(${grpc_proto_root} grpc/reflection/v1/reflection "")

set_source_files_properties(${proto_generated} PROPERTIES COMPILE_OPTIONS "-w")
file(GLOB proto_sources CONFIGURE_DEPENDS proto/*.c)
add_library(strata_proto STATIC ${proto_sources} ${proto_generated})
target_include_directories(strata_proto SYSTEM PRIVATE ${gen})
target_link_libraries(strata_proto PUBLIC strata_common PRIVATE dep_protobufc)
