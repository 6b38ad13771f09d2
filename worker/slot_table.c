// The memory of slots: a few words each, changed by commands and rows in the order of the plan. Runs on the
// device's thread; the executor owns the array.
#include "worker/slot_table.h"

int slot_state_apply(struct slot_state *slots, const struct step_command *command, struct error *error)
{
    if (command->kind == STEP_COPY)
        return STATUS_OK;
    struct slot_state *slot = &slots[command->slot];
    if (command->kind == STEP_OPEN) {
        if (slot->open)
            return error_set(error, STATUS_CORRUPT, "slot %u is opened, but it is open", command->slot);
        *slot = (struct slot_state){.open = true};
        return STATUS_OK;
    }
    if (!slot->open)
        return error_set(error, STATUS_CORRUPT, "slot %u is %s, but it is closed", command->slot,
                         command->kind == STEP_CLOSE ? "closed" : "given pages");
    if (command->kind == STEP_CLOSE) {
        *slot = (struct slot_state){.open = false};
        return STATUS_OK;
    }
    if (command->table_first > slot->n_pages)
        return error_set(error, STATUS_CORRUPT, "pages of slot %u begin at entry %u, but its table has %u",
                         command->slot, command->table_first, slot->n_pages);
    uint32_t end = command->table_first + command->pages_count;
    if (end > slot->n_pages)
        slot->n_pages = end;
    return STATUS_OK;
}

int slot_state_advance(struct slot_state *slots, const struct step_row *row, struct error *error)
{
    struct slot_state *slot = &slots[row->slot];
    if (!slot->open)
        return error_set(error, STATUS_CORRUPT, "a row computes slot %u, which is closed", row->slot);
    if (slot->started && row->position != slot->next_position)
        return error_set(error, STATUS_CORRUPT, "a row of slot %u begins at position %u, expected %u",
                         row->slot, row->position, slot->next_position);
    uint64_t end = (uint64_t)row->position + row->count;
    if (end > (uint64_t)slot->n_pages * KV_PAGE_POSITIONS)
        return error_set(error, STATUS_CORRUPT,
                         "a row of slot %u ends at position %llu, but its %u pages hold %u", row->slot,
                         (unsigned long long)end, slot->n_pages, slot->n_pages * KV_PAGE_POSITIONS);
    slot->started = true;
    slot->next_position = (uint32_t)end;
    return STATUS_OK;
}
