//! A flow's life. One state for both directions; every change is written to both entries.
//!
//! ```text
//!            SYN                 SYN-ACK               ACK
//!   (miss) ───────▶ Opening ───────────────▶ Answered ───────▶ Established          pending │ established
//!                     │  UDP: any reply                            │  ▲                     │
//!                     └────────────────────────────────────────────┘  │ data                │
//!                                                                      │                     │
//!   Established ── FIN from the consumer ──▶ ConsumerClosed ── FIN from the provider ──▶ Closed
//!   Established ── FIN from the provider ──▶ ProviderClosed ── FIN from the consumer ──▶ Closed
//!   any ── RST ──▶ Reset (pending flows are removed)         Closed, Reset ── SYN from the consumer ──▶ (miss)
//!   any established ── cut or revoked ──▶ Terminated         Terminated ── SYN from the consumer ──▶ (miss)
//! ```
//!
//! A RST whose sequence number cannot be right changes nothing (RFC 5961, 3.2). Another is not believed before both sides have fallen
//! silent: who receives it knows better, and it may be forged by somebody who knows the numbers. A segment that comes after some seconds of
//! silence takes the flow back to Established; without one, the flow ends as early as a closed one does.
//!
//! A terminated flow answers every segment of either side with a RST, and keeps its NAT port for as long as a closed one does.
//!
//! A half-closed flow keeps the listener's idle timeout, since data may go the other way for as long as it likes. Closed
//! and Reset only shorten the timeout: late segments are still delivered to the side that knows best what to do with them.

use crate::limits::{TCP_CLOSED, TCP_RESET};
use crate::tables::Course;
use crate::verdict::Direction;
use crate::wire::{FIN, RST};

/// [`Course::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// The consumer's first packet was seen.
    Opening = 1,
    /// The target answered SYN-ACK.
    Answered = 2,
    /// Both sides have spoken.
    Established = 3,
    /// The consumer sent FIN.
    ConsumerClosed = 4,
    /// The target sent FIN.
    ProviderClosed = 5,
    /// Both sent FIN.
    Closed = 6,
    /// One sent RST.
    Reset = 7,
    /// Its target is unhealthy or deregistered: whoever speaks is told by a RST.
    Terminated = 8,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Opening,
        Self::Answered,
        Self::Established,
        Self::ConsumerClosed,
        Self::ProviderClosed,
        Self::Closed,
        Self::Reset,
        Self::Terminated,
    ];

    /// The word that people see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Answered => "answered",
            Self::Established => "established",
            Self::ConsumerClosed => "consumer_closed",
            Self::ProviderClosed => "provider_closed",
            Self::Closed => "closed",
            Self::Reset => "reset",
            Self::Terminated => "terminated",
        }
    }

    /// The state with this number. Numbers that no state has, which only a foreign writer could have left, end the flow.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Opening,
            2 => Self::Answered,
            3 => Self::Established,
            4 => Self::ConsumerClosed,
            5 => Self::ProviderClosed,
            6 => Self::Closed,
            8 => Self::Terminated,
            _ => Self::Reset,
        }
    }

    /// The state of an established TCP flow after a segment with these flags.
    #[inline(always)]
    pub const fn after(self, direction: Direction, flags: u8) -> Self {
        if matches!(self, Self::Terminated) {
            return self;
        }
        if flags & RST != 0 {
            return Self::Reset;
        }
        if flags & FIN == 0 {
            return self;
        }
        match (self, direction) {
            (Self::Opening | Self::Answered | Self::Established, Direction::ToProvider) => {
                Self::ConsumerClosed
            }
            (Self::Opening | Self::Answered | Self::Established, Direction::ToConsumer) => {
                Self::ProviderClosed
            }
            (Self::ConsumerClosed, Direction::ToConsumer) | (Self::ProviderClosed, Direction::ToProvider) => {
                Self::Closed
            }
            (
                Self::ConsumerClosed | Self::ProviderClosed | Self::Closed | Self::Reset | Self::Terminated,
                _,
            ) => self,
        }
    }

    /// Whether the flow is over, so that a SYN opens another.
    #[inline(always)]
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Closed | Self::Reset | Self::Terminated)
    }

    /// The idle timeout on entering this state, where it is not the one that the flow has.
    /// `hold` is that of flows which both sides have closed.
    #[inline(always)]
    pub const fn idle_timeout(self, current: u16, hold: u16) -> u16 {
        match self {
            Self::Closed => hold,
            Self::Terminated => TCP_CLOSED,
            Self::Opening
            | Self::Answered
            | Self::Established
            | Self::ConsumerClosed
            | Self::ProviderClosed
            // Not believed yet: Flow::patience.
            | Self::Reset => current,
        }
    }
}

impl Course {
    /// Seconds without a packet in either direction after which the flow has ended.
    #[inline(always)]
    pub fn patience(&self) -> u32 {
        let timeout = if self.state == State::Reset as u8 {
            self.idle_timeout.min(TCP_RESET)
        } else {
            self.idle_timeout
        };
        timeout.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ACK, SYN};
    use Direction::{ToConsumer, ToProvider};
    use State::*;

    #[test]
    fn every_transition_is_the_one_in_the_picture() {
        for state in State::ALL {
            for direction in [ToProvider, ToConsumer] {
                for flags in 0..=u8::MAX {
                    let expected = match (state, direction, flags & RST != 0, flags & FIN != 0) {
                        (Terminated, ..) => Terminated,
                        (_, _, true, _) => Reset,
                        (_, _, false, false) => state,
                        (Opening | Answered | Established, ToProvider, ..) => ConsumerClosed,
                        (Opening | Answered | Established, ToConsumer, ..) => ProviderClosed,
                        (ConsumerClosed, ToConsumer, ..) | (ProviderClosed, ToProvider, ..) => Closed,
                        (other, ..) => other,
                    };
                    assert_eq!(state.after(direction, flags), expected, "{state:?} {direction:?} {flags:#x}");
                }
            }
        }
        assert_eq!(Established.after(ToProvider, SYN | ACK), Established, "a SYN by itself changes nothing");
    }

    #[test]
    fn every_state_has_its_number() {
        for state in State::ALL {
            assert_eq!(State::from_number(state as u8), state);
        }
        assert_eq!(State::from_number(0), Reset);
    }
}
