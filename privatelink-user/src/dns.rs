//! The VPCs' resolvers (AWS: "Amazon DNS server", Route 53 Resolver). Each listens inside its VPC's own stack, answers what its VPC's
//! names are, and asks the VPC's name servers about all others.
//!
//! ```text
//!   names (model, connections, health) ─▶ entries ─▶ view ─┐
//!                          question ─▶ server ─▶ answer ───┴▶ ours: answered at once
//!                                                   └▶ forward ─▶ a name server, from inside the VPC
//! ```

pub mod answer;
pub mod entries;
pub mod forward;
pub mod server;
pub mod verify;
pub mod view;

pub use entries::{Entry, Standing};
pub use server::Resolver;
pub use view::View;
