//! What fills the tables. Pure functions over memory that the caller owns.

pub mod maglev;
