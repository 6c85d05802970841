//! A run as one page for a browser: tables and plots, readable by itself, on a phone and printed.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Scenario;
use super::chart::{self, Chart, ChartError, short};
use super::glossary::GLOSSARY;
use super::outliers::median;
use super::report::{Digest, Report};

const STYLE: &str = "
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h3 { font-size: 1rem; } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
p.reading, p.note { color: #555; } p.warning { background: #fff3cd; padding: .5rem .75rem; border-left: 4px solid #d39e00; }
nav a { margin-right: .9rem; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .15rem .5rem; text-align: left; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
th.n, td.n { text-align: right; white-space: nowrap; } td.case { white-space: nowrap; } td.with { color: #666; font-size: .85em; min-width: 9rem; }
thead th { border-bottom: 2px solid #888; } td.p50 { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: .6rem 1rem; margin: 1.2rem 0; }
figure { margin: 0; } figure svg { width: 100%; max-width: 40rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { color: #555; } dd { margin: 0; }
.words { grid-template-columns: minmax(8rem, 15rem) 1fr; font-size: .9rem; }
code, pre { background: #f4f4f4; font-size: .9em; } pre { padding: .6rem; overflow-x: auto; }
@media print { body { max-width: none; font-size: 10pt; } nav { display: none; } .wide { overflow: visible; }
  figure, tr { break-inside: avoid; } h2, h2 + p { break-after: avoid; } table { font-size: 8pt; } td.case { white-space: normal; } }
";

/// The page of a report, whose rows are of these scenarios; with their charts.
pub fn html(
    report: &Report,
    scenarios: &[&Scenario],
    charts: &[Chart],
) -> Result<String, ChartError> {
    let drawn: Vec<(&Chart, String)> = charts
        .iter()
        .map(|chart| Ok((chart, chart::svg(chart)?)))
        .collect::<Result<_, _>>()?;
    let sections: Vec<&Scenario> = scenarios
        .iter()
        .copied()
        .filter(|scenario| report.rows.iter().any(|row| row.scenario == scenario.name))
        .collect();
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "forkvm " (env!("CARGO_PKG_VERSION")) ": benchmarks on KVM " (report.host.kvm) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "forkvm " (env!("CARGO_PKG_VERSION")) ": what a fork of a VM costs" }
                (circumstances(report))
                nav {
                    a href="#words" { "words" }
                    @for one in &sections { a href=(format!("#{}", one.name)) { (one.name) } }
                }
                (words())
                @for one in &sections { (section(one, report, &drawn)) }
                (how_to_repeat(report))
            }
        }
    };
    Ok(page.into_string())
}

fn circumstances(report: &Report) -> Markup {
    let host = &report.host;
    html! {
        @if report.partial {
            p.warning { "This run is partial: it was stopped, or a part of it failed, before everything was measured." }
        }
        @if report.quick {
            p.warning { "A quick run: few repetitions, small sizes. Not for quoting." }
        }
        dl {
            dt { "KVM" } dd { (host.kvm) }
            dt { "kernel" } dd { "Linux " (host.kernel) }
            dt { "CPU" } dd { (host.cpu_model) ", " (host.cpus) " usable" }
            dt { "RAM" } dd { (host.memory_mib) " MiB" }
            dt { "load at the start" } dd { (short(host.load1)) }
            dt { "seed" } dd { (report.seed) }
        }
    }
}

fn words() -> Markup {
    html! {
        section id="words" {
            h2 { "Words" }
            dl.words { @for one in GLOSSARY { dt { (one.words) } dd { (one.meaning) } } }
        }
    }
}

fn section(scenario: &Scenario, report: &Report, drawn: &[(&Chart, String)]) -> Markup {
    let digest = Digest::of(
        report
            .rows
            .iter()
            .filter(|row| row.scenario == scenario.name),
    );
    let own = drawn
        .iter()
        .filter(|(chart, _)| chart.name.starts_with(scenario.name));
    let loads: Vec<f64> = digest.rows.iter().map(|row| row.on.load1).collect();
    let left_out = report.skipped.iter().chain(&report.failed);
    let left_out = left_out.filter(|one| one.scenario == scenario.name);
    html! {
        section id=(scenario.name) {
            h2 { (scenario.name) }
            p { (capitalised(scenario.about)) "." }
            p.reading { (scenario.reading) }
            @for one in left_out { p.warning { "Not measured: " code { (one.case) } ": " (one.why) } }
            @if own.clone().next().is_some() {
                div.figures {
                    @for (chart, svg) in own {
                        figure role="img" aria-label=(chart.title) { (PreEscaped(svg)) }
                    }
                }
            }
            p.note {
                "Load average while it was measured, its own included: " (short(median(&loads))) "."
                @if !digest.common.is_empty() { " In all rows: " (named(&digest.common)) "." }
                @for (of, version) in digest.versions() { " Version of " (of) ": " (version) "." }
            }
            div.wide { (table(&digest)) }
            @if !digest.by_phase.is_empty() {
                h3 { "Phases, median in us" }
                div.wide { (phases(&digest)) }
            }
            @if let Some((cases, most)) = digest.outliers() {
                p.note {
                    "Outliers in " (cases) " cases, most in " code { (most.case) } " ("
                    (most.outliers) " of " (most.percentiles.n)
                    @if most.first_is_slow { ", the first value among them" } ")."
                }
            }
        }
    }
}

fn named(columns: &[(&str, f64)]) -> String {
    let one = |(name, value): &(&str, f64)| format!("{name} {}", short(*value));
    columns.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn table(digest: &Digest<'_>) -> Markup {
    html! {
        table {
            thead {
                tr {
                    th { "case" } th { "unit" }
                    @for name in ["p50", "p90", "p99", "min", "max", "n", "outliers"] { th.n { (name) } }
                    th {}
                }
            }
            tbody {
                @for row in &digest.rows {
                    @let found = &row.percentiles;
                    tr {
                        td.case { (row.case) } td { (row.unit.as_str()) }
                        td.n.p50 { (short(found.p50)) }
                        @for value in [found.p90, found.p99, found.min, found.max] { td.n { (short(value)) } }
                        td.n { (found.n) } td.n { (row.outliers_if_known()) }
                        td.with { (named(&digest.own(row))) }
                    }
                }
            }
        }
    }
}

fn phases(digest: &Digest<'_>) -> Markup {
    html! {
        table {
            thead { tr { th {} @for phase in &digest.phases { th.n { (phase) } } } }
            tbody {
                @for (way, medians) in &digest.by_phase {
                    tr {
                        td.case { (way) }
                        @for median in medians { td.n { (median.map_or_else(|| "-".to_owned(), short)) } }
                    }
                }
            }
        }
    }
}

fn how_to_repeat(report: &Report) -> Markup {
    let quick = if report.quick { " --quick" } else { "" };
    html! {
        section {
            h2 { "How to repeat and cite" }
            p { "On the same kind of host, otherwise idle:" }
            pre { "forkvm bench " (report.scenario) " --seed " (report.seed) (quick) " --json FILE --html FILE" }
            p {
                "Quote a figure with its scenario and case (which name the clock, the end point and what was set up), the percentile and n, and "
                "KVM flavour, kernel, CPU and version as above; docs/benchmarks.md explains each scenario. "
                "Outliers lie more than 10 standard deviations from the median by the modified z-score (median absolute deviation); they are counted, "
                "never dropped. "
                code { "forkvm bench compare OLD.json NEW.json" } " says what changed beyond noise."
            }
        }
    }
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters
        .next()
        .map(|first| first.to_uppercase().to_string());
    first.unwrap_or_default() + characters.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::{Samples, Unit};
    use crate::bench::report::rows;
    use crate::bench::runner::Plan;
    use crate::bench::{SCENARIOS, Scale};

    #[test]
    fn the_page_stands_by_itself_and_shows_every_row_and_its_host() {
        let plan = Plan {
            seed: 42,
            scale: Scale::Full,
        };
        let mut report = Report::begin("all", plan);
        report.host.cpu_model = "A <CPU>".into();
        let scenario = SCENARIOS[0];
        let mut samples = Samples::default();
        samples
            .value("some/case", Unit::Us, 12.5)
            .column("pages", 16.0);
        report.rows = rows(scenario.name, &samples, &report.host);
        let page = html(&report, SCENARIOS, &(scenario.charts)(&report.rows)).unwrap();
        for due in [
            "some/case",
            "12.5",
            "pages 16",
            "A &lt;CPU&gt;",
            "--seed 42",
            "first_action",
            report.host.kernel.as_str(),
        ] {
            assert!(page.contains(due), "{due} is not in {page}");
        }
        for outside in ["<script", "<link", "src=\"http", "url("] {
            assert!(!page.contains(outside), "{outside} is in the page");
        }
        assert!(!page.contains("This run is partial"));
        report.partial = true;
        assert!(
            html(&report, SCENARIOS, &[])
                .unwrap()
                .contains("This run is partial")
        );
    }
}
