//! The agent and the command line of privatelink.

pub mod agent;
pub mod api;
pub mod capture;
pub mod cli;
pub mod config;
pub mod drops;
pub mod explain;
pub mod features;
pub mod flows;
pub mod health;
pub mod kernel;
pub mod listing;
pub mod maps;
pub mod model;
pub mod names;
pub mod neighbours;
pub mod net;
pub mod plan;
pub mod probe;
pub mod reconcile;
pub mod resize;
pub mod sys;
