//! Target health: what is concluded from checks, in AWS's words.

use crate::model::HealthCheck;
use privatelink_common::tables::{DRAINING, HEALTHY, INITIAL, UNCHECKED, UNHEALTHY};

/// What checks have shown of one target.
///
/// ```text
///   initial ── one success ──▶ healthy ── unhealthy_threshold failures in a row ──▶ unhealthy
///   initial ── unhealthy_threshold failures in a row ──▶ unhealthy ── healthy_threshold successes in a row ──▶ healthy
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// [`INITIAL`], [`HEALTHY`] or [`UNHEALTHY`].
    pub state: u16,
    /// Results in a row that speak against the state.
    against: u8,
}

impl Health {
    /// A target in this state, as far as is known.
    pub fn new(state: u16) -> Self {
        Self { state, against: 0 }
    }

    /// Takes one result into account. A new target is healthy after one success (AWS: target-group-health-checks).
    pub fn observe(&mut self, success: bool, how: &HealthCheck) {
        let (other, threshold) = match (self.state, success) {
            (INITIAL, true) => (HEALTHY, 1),
            (UNHEALTHY, true) => (HEALTHY, how.healthy_threshold),
            (INITIAL | HEALTHY, false) => (UNHEALTHY, how.unhealthy_threshold),
            _ => {
                self.against = 0;
                return;
            }
        };
        self.against += 1;
        if self.against >= threshold {
            *self = Self::new(other);
        }
    }
}

/// A target's state as AWS tells it: elbv2's `TargetHealth`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// `State`
    pub state: &'static str,
    /// `Reason`, where the state has one.
    pub reason: Option<&'static str>,
    /// `Description`, likewise.
    pub description: Option<String>,
}

/// Puts a state into AWS's words; `used` says whether a load balancer sends to the target, `failure` what its last check lacked.
pub fn describe(state: u16, used: bool, failure: Option<&String>) -> Description {
    let words = |state, reason, description: &str| Description {
        state,
        reason: Some(reason),
        description: Some(description.to_owned()),
    };
    if !used {
        let description = "Target group is not configured to receive traffic from the load balancer";
        return words("unused", "Target.NotInUse", description);
    }
    match state {
        HEALTHY => Description { state: "healthy", reason: None, description: None },
        UNHEALTHY => {
            let failure = failure.map_or(String::new(), |failure| format!(": {failure}"));
            words("unhealthy", "Target.FailedHealthChecks", &format!("Health checks failed{failure}"))
        }
        DRAINING => {
            words("draining", "Target.DeregistrationInProgress", "Target deregistration is in progress")
        }
        UNCHECKED => {
            words("unavailable", "Target.HealthCheckDisabled", "Health checks are disabled for this target")
        }
        _ => words("initial", "Elb.InitialHealthChecking", "Initial health checks in progress"),
    }
}

/// The word for a target's state (AWS).
pub fn name(state: u16) -> &'static str {
    match state {
        HEALTHY => "healthy",
        UNHEALTHY => "unhealthy",
        UNCHECKED => "unavailable",
        DRAINING => "draining",
        _ => "initial",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CheckProtocol;
    use std::time::Duration;

    fn how() -> HealthCheck {
        HealthCheck {
            enabled: true,
            protocol: CheckProtocol::Tcp,
            port: None,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            healthy_threshold: 3,
            unhealthy_threshold: 2,
        }
    }

    fn after(state: u16, results: &[bool]) -> u16 {
        let mut health = Health::new(state);
        results.iter().for_each(|success| health.observe(*success, &how()));
        health.state
    }

    #[test]
    fn every_transition_takes_its_threshold_in_a_row() {
        assert_eq!(after(INITIAL, &[true]), HEALTHY);
        assert_eq!(after(INITIAL, &[false]), INITIAL);
        assert_eq!(after(INITIAL, &[false, false]), UNHEALTHY);
        assert_eq!(after(HEALTHY, &[false, true, false]), HEALTHY, "a success starts the count again");
        assert_eq!(after(HEALTHY, &[false, false]), UNHEALTHY);
        assert_eq!(after(UNHEALTHY, &[true, true]), UNHEALTHY);
        assert_eq!(after(UNHEALTHY, &[true, true, false, true, true]), UNHEALTHY);
        assert_eq!(after(UNHEALTHY, &[true, true, true]), HEALTHY);
    }
}
