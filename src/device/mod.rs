//! Floor 2: the devices of a machine.
