"""One process or many: launch, collectives, sharding, interrupts."""
