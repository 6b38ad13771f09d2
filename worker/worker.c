// The worker: joins a pool, loads its stage, runs its steps.
