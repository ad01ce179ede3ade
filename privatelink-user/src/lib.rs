//! The agent and the command line of privatelink.

pub mod config;
pub mod kernel;
pub mod maps;
pub mod model;
pub mod reconcile;
pub mod plan;
pub mod names;
pub mod net;
pub mod sys;
pub mod explain;
pub mod flows;
pub mod health;
pub mod neighbours;
pub mod agent;
pub mod api;
pub mod cli;
pub mod listing;
