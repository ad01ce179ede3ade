//! Passive health checks: a target that refuses or ignores new connections is unhealthy before its next check says so (AWS:
//! target-group-health-checks; not for UDP).

use super::Agent;
use crate::flows;
use crate::health::Health;
use crate::names::Kind;
use anyhow::Result;
use log::info;
use privatelink_common::tables::{HEALTHY, TargetCounters, UNHEALTHY};

/// Connections in a row, without one that was answered, that make a target unhealthy.
const FAILURES: u64 = 3;
/// How long a connection may take to be answered, in seconds: Linux sends its SYN again after one and after three.
const PATIENCE: u32 = 4;

/// What a target's new connections have met since the last one that it answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Streak {
    /// The counters when it began.
    from: TargetCounters,
    /// When the first of its connections was seen, in seconds since boot; none: there is none.
    since: Option<u32>,
}

impl Streak {
    fn new(from: TargetCounters) -> Self {
        Self { from, since: None }
    }

    /// Goes on to `now`; says what is wrong, if the target has failed.
    fn failure(&mut self, counters: TargetCounters, now: u32) -> Option<String> {
        if counters.answered != self.from.answered || counters.opened < self.from.opened {
            *self = Self::new(counters);
            return None;
        }
        let (opened, refused) = (counters.opened - self.from.opened, counters.refused - self.from.refused);
        if opened == 0 {
            return None;
        }
        let since = *self.since.get_or_insert(now);
        if refused >= FAILURES {
            return Some(format!("{refused} connections in a row were refused"));
        }
        let waited = now.saturating_sub(since);
        (opened >= FAILURES && waited >= PATIENCE)
            .then(|| format!("none of {opened} connections was answered within {waited} s"))
    }
}

impl Agent {
    /// What a target's new flows have met so far.
    pub fn target_counters(&self, target: u32) -> Result<TargetCounters> {
        let add = |sum: TargetCounters, it: &TargetCounters| TargetCounters {
            opened: sum.opened + it.opened,
            answered: sum.answered + it.answered,
            refused: sum.refused + it.refused,
            port_allocation_errors: sum.port_allocation_errors + it.port_allocation_errors,
        };
        Ok(self.maps.target_counters.get(target)?.iter().fold(TargetCounters::default(), add))
    }

    /// Looks at what healthy targets do with new connections.
    pub(super) fn look_at_targets(&mut self) -> Result<()> {
        let mut failed = false;
        let healthy: Vec<u32> = self
            .image
            .targets
            .iter()
            .filter(|(_, target)| target.state == HEALTHY)
            .map(|(id, _)| *id)
            .collect();
        self.streaks.retain(|id, _| healthy.binary_search(id).is_ok());
        for id in healthy {
            let counters = self.target_counters(id)?;
            let streak = self.streaks.entry(id).or_insert_with(|| Streak::new(counters));
            let Some(failure) = streak.failure(counters, flows::now()) else { continue };
            let name = self.names.name(Kind::Target, id);
            info!("target {name} is unhealthy, was healthy: {failure}");
            self.health.insert(id, Health::new(UNHEALTHY));
            self.reasons.insert(id, failure);
            failed = true;
        }
        if failed {
            self.refresh();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(opened: u64, answered: u64, refused: u64) -> TargetCounters {
        TargetCounters { opened, answered, refused, port_allocation_errors: 0 }
    }

    #[test]
    fn three_refusals_in_a_row_are_a_failure_and_an_answer_starts_the_count_again() {
        let mut streak = Streak::new(counters(10, 8, 2));
        assert_eq!(streak.failure(counters(12, 8, 4), 100), None);
        assert_eq!(streak.failure(counters(13, 9, 4), 100), None);
        assert_eq!(streak.failure(counters(15, 9, 6), 101), None);
        assert!(
            streak.failure(counters(16, 9, 7), 101).unwrap().contains("3 connections in a row were refused")
        );
    }

    #[test]
    fn connections_that_no_one_answers_are_a_failure_after_a_while() {
        let mut streak = Streak::new(counters(0, 0, 0));
        assert_eq!(streak.failure(counters(5, 0, 0), 100), None);
        assert_eq!(streak.failure(counters(5, 0, 0), 103), None);
        assert!(streak.failure(counters(5, 0, 0), 104).is_some());
        let mut streak = Streak::new(counters(0, 0, 0));
        assert_eq!(streak.failure(counters(2, 0, 0), 100), None);
        assert_eq!(streak.failure(counters(2, 0, 0), 200), None, "two may be anybody's");
    }
}
