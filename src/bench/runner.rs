//! Does the experiments of a scenario, warm, in an order that a seed determines.
//!
//! The repetitions of all experiments are shuffled among each other, so that what changes on the host
//! meanwhile (heat, other programs, a filling page cache) falls on all cases alike and not on
//! the last ones. Everything that an experiment makes lives until its last repetition.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::measure::{BenchError, Experiment, Samples};
use super::report::{LOAD, LeftOut, Report, rows};
use super::{Scale, Scenario};
use crate::host::Host;

/// Who watches a run.
pub trait Watch {
    /// `done` of `total` repetitions are behind; next comes `on`, whose name says what it is.
    fn at(&mut self, done: u64, total: u64, on: &str);

    /// Whether to stop with what there is. Asked between repetitions.
    fn stops(&self) -> bool;
}

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What the order follows from.
    pub seed: u64,
    /// How much.
    pub scale: Scale,
}

impl Report {
    /// A report without a row, of the scenarios that go by the name `scenario`.
    pub fn begin(scenario: &str, plan: Plan) -> Report {
        Report {
            host: Host::here(),
            scenario: scenario.to_owned(),
            seed: plan.seed,
            quick: plan.scale != Scale::Full,
            partial: false,
            rows: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Runs `scenario` and adds what it gives. Not any more after somebody stopped it.
    pub fn run(&mut self, scenario: &Scenario, plan: Plan, watch: &mut dyn Watch) {
        let experiments = (scenario.experiments)(plan.scale);
        let mut run = Run {
            scenario: scenario.name,
            report: self,
            done: 0,
            total: experiments
                .iter()
                .map(|experiment| in_all(experiment.as_ref()))
                .sum(),
        };
        let mut ready = run.prepare(experiments, watch);
        let order = order(&ready, plan.seed);
        run.measure(&mut ready, &order, watch);
        for experiment in &ready {
            let rows = rows(scenario.name, &experiment.samples, &self.host);
            self.rows.extend(rows);
        }
    }
}

/// An experiment that can be repeated, and what it gave.
struct Ready {
    /// Gone when it is done, or has failed.
    experiment: Option<Box<dyn Experiment>>,
    left: u32,
    samples: Samples,
}

/// A scenario under way.
struct Run<'a> {
    scenario: &'static str,
    report: &'a mut Report,
    done: u64,
    total: u64,
}

fn in_all(experiment: &dyn Experiment) -> u64 {
    let times = experiment.repetitions();
    u64::from(times.warm_up) + u64::from(times.measured)
}

/// Indices of `ready`, each as often as it is to be repeated, shuffled.
fn order(ready: &[Ready], seed: u64) -> Vec<usize> {
    let each = |(index, one): (usize, &Ready)| vec![index; one.left as usize];
    let mut order: Vec<usize> = ready.iter().enumerate().flat_map(each).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order
}

impl Run<'_> {
    /// Makes what the experiments need and warms them up.
    fn prepare(
        &mut self,
        experiments: Vec<Box<dyn Experiment>>,
        watch: &mut dyn Watch,
    ) -> Vec<Ready> {
        let mut ready = Vec::new();
        for mut experiment in experiments {
            let times = experiment.repetitions();
            match self.warm_up(experiment.as_mut(), watch) {
                Ok(()) => ready.push(Ready {
                    experiment: Some(experiment),
                    left: times.measured,
                    samples: Samples::default(),
                }),
                Err(error) => {
                    self.leave_out(experiment.as_ref(), error);
                    self.done += u64::from(times.measured);
                }
            }
        }
        ready
    }

    fn warm_up(
        &mut self,
        experiment: &mut dyn Experiment,
        watch: &mut dyn Watch,
    ) -> Result<(), BenchError> {
        let times = experiment.repetitions();
        watch.at(self.done, self.total, &experiment.name());
        if watch.stops() {
            return Ok(());
        }
        let before = self.done;
        let warm = (|| {
            experiment.prepare()?;
            for _ in 0..times.warm_up {
                watch.at(self.done, self.total, &experiment.name());
                if watch.stops() {
                    break;
                }
                experiment.repeat(&mut Samples::default())?;
                self.done += 1;
            }
            Ok(())
        })();
        self.done = before + u64::from(times.warm_up);
        warm
    }

    /// Repeats them in this order.
    fn measure(&mut self, ready: &mut [Ready], order: &[usize], watch: &mut dyn Watch) {
        for &index in order {
            if watch.stops() {
                self.report.partial = true;
                return;
            }
            let one = &mut ready[index];
            if let Some(experiment) = &mut one.experiment {
                watch.at(self.done, self.total, &experiment.name());
                match repeat(experiment.as_mut(), &mut one.samples) {
                    Ok(()) => one.left -= 1,
                    Err(error) => {
                        self.leave_out(experiment.as_ref(), error);
                        one.left = 0;
                    }
                }
                if one.left == 0 {
                    one.experiment = None;
                }
            }
            self.done += 1;
        }
    }

    fn leave_out(&mut self, experiment: &dyn Experiment, error: BenchError) {
        let lacks = matches!(error, BenchError::Lacks(_));
        let left_out = LeftOut {
            scenario: self.scenario,
            case: experiment.name(),
            why: with_causes(&error),
        };
        if lacks {
            self.report.skipped.push(left_out);
        } else {
            self.report.failed.push(left_out);
            self.report.partial = true;
        }
    }
}

/// One repetition, and the load beside each value that it gave.
fn repeat(experiment: &mut dyn Experiment, samples: &mut Samples) -> Result<(), BenchError> {
    let before: Vec<usize> = samples
        .cases()
        .iter()
        .map(|case| case.values.len())
        .collect();
    experiment.repeat(samples)?;
    let load = Host::load1();
    for (index, case) in samples.cases_mut().iter_mut().enumerate() {
        if case.values.len() > before.get(index).copied().unwrap_or(0) {
            case.column(LOAD, load);
        }
    }
    Ok(())
}

/// An error and its causes, each once.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;
    use crate::bench::measure::{Repetitions, Unit, call};

    /// Gives its own name and the number of the repetition.
    struct Counting {
        name: &'static str,
        count: f64,
        log: Rc<Cell<String>>,
        fails_at: Option<u32>,
    }

    impl Experiment for Counting {
        fn name(&self) -> String {
            self.name.into()
        }

        fn repetitions(&self) -> Repetitions {
            Repetitions {
                warm_up: 2,
                measured: 5,
            }
        }

        fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
            self.count += 1.0;
            if self.fails_at.is_some_and(|at| f64::from(at) <= self.count) {
                return Err(call("nothing")(std::io::Error::other("it is to fail")));
            }
            samples.value(self.name, Unit::Us, self.count);
            self.log.set(self.log.take() + self.name);
            Ok(())
        }
    }

    fn counting(
        name: &'static str,
        log: &Rc<Cell<String>>,
        fails_at: Option<u32>,
    ) -> Box<dyn Experiment> {
        Box::new(Counting {
            name,
            count: 0.0,
            log: log.clone(),
            fails_at,
        })
    }

    /// Stops after so many repetitions.
    struct StopAfter(u64, Cell<u64>);

    impl Watch for StopAfter {
        fn at(&mut self, done: u64, total: u64, _on: &str) {
            assert!(done <= total, "{done} of {total}");
            self.1.set(done);
        }

        fn stops(&self) -> bool {
            self.1.get() >= self.0
        }
    }

    fn run(seed: u64, fails_at: Option<u32>, stop_after: u64) -> (Report, String) {
        let log = Rc::new(Cell::new(String::new()));
        let plan = Plan {
            seed,
            scale: Scale::Quick,
        };
        let mut report = Report::begin("test", plan);
        let experiments = vec![counting("a", &log, fails_at), counting("b", &log, None)];
        let mut watch = StopAfter(stop_after, Cell::new(0));
        let mut run = Run {
            scenario: "test",
            total: experiments.iter().map(|one| in_all(one.as_ref())).sum(),
            report: &mut report,
            done: 0,
        };
        let mut ready = run.prepare(experiments, &mut watch);
        let order = order(&ready, plan.seed);
        run.measure(&mut ready, &order, &mut watch);
        let host = report.host.clone();
        for one in &ready {
            report.rows.extend(rows("test", &one.samples, &host));
        }
        (report, log.take())
    }

    #[test]
    fn a_warm_up_gives_no_sample() {
        let (report, log) = run(1, None, 100);
        assert_eq!(log.len(), 14);
        for row in &report.rows {
            assert_eq!(row.values, [3.0, 4.0, 5.0, 6.0, 7.0], "{}", row.case);
        }
        assert!(!report.partial);
    }

    #[test]
    fn the_order_follows_from_the_seed_and_mixes_the_experiments() {
        let (_, one) = run(1, None, 100);
        let (_, again) = run(1, None, 100);
        let (_, other) = run(2, None, 100);
        assert_eq!(one, again);
        assert_ne!(one, other);
        assert!(!one.ends_with("aaaaabbbbb"), "{one}");
    }

    #[test]
    fn one_that_is_stopped_keeps_what_there_is_and_says_so() {
        let (report, _) = run(1, None, 8);
        assert!(report.partial);
        let values: usize = report.rows.iter().map(|row| row.values.len()).sum();
        // Four of the warm-up, four, and the one that was under way.
        assert_eq!(values, 5);
    }

    #[test]
    fn an_experiment_that_fails_is_named_and_the_others_go_on() {
        let (report, _) = run(1, Some(4), 100);
        assert!(report.partial);
        assert_eq!(report.failed.len(), 1);
        assert_eq!(report.failed[0].case, "a");
        let values: Vec<usize> = report.rows.iter().map(|row| row.values.len()).collect();
        assert_eq!(values, [1, 5]);
    }
}
