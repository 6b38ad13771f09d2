// grpc.health.v1: two small messages each way.
#include "grpc/health/v1/health.pb-c.h"
#include "proto/wire_internal.h"

int wire_decode_health_request(const char **service, const uint8_t *bytes, size_t length, struct arena *arena,
                               struct error *error)
{
    struct wire_decoder d = {
        .arena = arena, .error = error, .message = "HealthCheckRequest", .blame = STATUS_INVALID};
    *service = "";
    Grpc__Health__V1__HealthCheckRequest *m =
        wire_unpack(&d, &grpc__health__v1__health_check_request__descriptor, bytes, length);
    if (m)
        *service = wire_take_cstr(&d, m->service, "service");
    return d.status;
}

int wire_encode_health_request(struct wire_bytes *to, const char *service)
{
    struct wire_encoder e = {0};
    Grpc__Health__V1__HealthCheckRequest m = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    m.service = wire_put_cstr(&e, service);
    return wire_encode_end(&e, to, &m.base);
}

int wire_encode_health_response(struct wire_bytes *to, enum wire_health status)
{
    Grpc__Health__V1__HealthCheckResponse m = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    m.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)status;
    return wire_pack(to, &m.base);
}

int wire_decode_health_response(enum wire_health *out, const uint8_t *bytes, size_t length,
                                struct error *error)
{
    struct arena arena = {0};
    struct wire_decoder d = {
        .arena = &arena, .error = error, .message = "HealthCheckResponse", .blame = STATUS_CORRUPT};
    *out = WIRE_HEALTH_UNKNOWN;
    Grpc__Health__V1__HealthCheckResponse *m =
        wire_unpack(&d, &grpc__health__v1__health_check_response__descriptor, bytes, length);
    if (m && (unsigned)m->status <= WIRE_HEALTH_SERVICE_UNKNOWN)
        *out = (enum wire_health)m->status;
    arena_free(&arena);
    return d.status;
}
