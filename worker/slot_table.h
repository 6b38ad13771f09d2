// What a stage remembers of every slot between steps: whether a sequence is open in it, how many pages its
// table has, which position comes next. Checks the commands and rows of a plan against that memory, which
// step_plan_validate cannot do. Belongs to the device's thread.
//
// Rules: a slot is opened when closed and closed when open. A page table grows without holes; its entries may
// be replaced. The first row after an open may begin at any position that the page table covers (what lies
// before it was computed by another sequence: a shared prefix); every later row begins where the last one
// ended.
#ifndef STRATA_SLOT_TABLE_H
#define STRATA_SLOT_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "common/step_plan.h"

struct slot_state {
    bool open, started;
    uint32_t n_pages;       // entries of its page table
    uint32_t next_position; // once started
};

int slot_state_apply(struct slot_state *slots, const struct step_command *command, struct error *error);
int slot_state_advance(struct slot_state *slots, const struct step_row *row, struct error *error);

#endif
