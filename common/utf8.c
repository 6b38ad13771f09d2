// The table of well-formed sequences (Unicode, table 3-7): a lead byte fixes how many bytes follow and, for a
// few lead bytes, narrows the range of the second one. All others are 80..BF. No state.
#include "common/utf8.h"

#include <stdint.h>
#include <string.h>

struct lead {
    unsigned length;               // of the whole character, 0 = no lead byte
    unsigned char least, greatest; // second byte
};

static struct lead lead_of(unsigned char byte)
{
    if (byte >= 0xC2 && byte <= 0xDF)
        return (struct lead){2, 0x80, 0xBF};
    if (byte >= 0xE0 && byte <= 0xEF)
        return (struct lead){3, byte == 0xE0 ? 0xA0 : 0x80, byte == 0xED ? 0x9F : 0xBF};
    if (byte >= 0xF0 && byte <= 0xF4)
        return (struct lead){4, byte == 0xF0 ? 0x90 : 0x80, byte == 0xF4 ? 0x8F : 0xBF};
    return (struct lead){0, 0, 0};
}

enum utf8_kind utf8_scan(const void *data, size_t length, size_t *taken)
{
    const unsigned char *bytes = data;
    *taken = 1;
    if (bytes[0] < 0x80)
        return UTF8_WHOLE;
    struct lead lead = lead_of(bytes[0]);
    if (lead.length == 0)
        return UTF8_BROKEN;
    for (size_t i = 1; i < lead.length; i++) {
        if (i == length)
            return UTF8_PARTIAL;
        unsigned char least = i == 1 ? lead.least : 0x80, greatest = i == 1 ? lead.greatest : 0xBF;
        if (bytes[i] < least || bytes[i] > greatest)
            return UTF8_BROKEN;
        *taken = i + 1;
    }
    return UTF8_WHOLE;
}

size_t utf8_valid_prefix(const void *data, size_t length)
{
    const unsigned char *bytes = data;
    size_t at = 0;
    while (at < length) {
        uint64_t eight;
        if (length - at >= sizeof(eight)) {
            memcpy(&eight, bytes + at, sizeof(eight));
            if (!(eight & 0x8080808080808080u)) {
                at += sizeof(eight);
                continue;
            }
        }
        size_t taken;
        if (utf8_scan(bytes + at, length - at, &taken) != UTF8_WHOLE)
            break;
        at += taken;
    }
    return at;
}

// C0 controls, DEL, and the C1 controls that some terminals obey.
static int is_control(const unsigned char *bytes)
{
    return bytes[0] < 0x20 || bytes[0] == 0x7F || (bytes[0] == 0xC2 && bytes[1] < 0xA0);
}

size_t utf8_copy_clean(char *to, size_t capacity, const void *data, size_t length)
{
    const unsigned char *bytes = data;
    size_t used = 0, taken;
    for (size_t at = 0; at < length; at += taken) {
        enum utf8_kind kind = utf8_scan(bytes + at, length - at, &taken);
        int clean = kind == UTF8_WHOLE && !is_control(bytes + at);
        size_t size = clean ? taken : 1;
        if (size > capacity - 1 - used)
            break;
        if (clean)
            memcpy(to + used, bytes + at, taken);
        else
            to[used] = '?';
        used += size;
    }
    to[used] = '\0';
    return used;
}
