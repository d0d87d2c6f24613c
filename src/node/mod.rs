//! Floor 5: the two drivers. They turn events into inputs and actions into effects.

pub mod config;
