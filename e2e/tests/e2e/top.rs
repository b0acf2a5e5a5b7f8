//! `drupe top`: which pod uses what.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::{Node, eventually, patient};

use crate::command_line::{drupe_command, fails, prints};
use crate::on_drupe;

/// The cells of a table's pods, by its order.
fn rows(table: &str) -> Result<Vec<Vec<&str>>> {
    let mut lines = table.lines().skip_while(|line| !line.starts_with("POD ID"));
    lines.next().with_context(|| format!("no head: {table}"))?;
    let rows = lines.take_while(|line| !line.is_empty());
    Ok(rows.map(|row| row.split_whitespace().collect()).collect())
}

fn number(cell: &str, unit: &str) -> Result<f64> {
    let number = cell.strip_suffix(unit);
    Ok(number
        .with_context(|| format!("{cell} has no {unit}"))?
        .parse()?)
}

#[test]
fn the_busy_pod_is_above_the_idle_one() -> Result<()> {
    let node = Node::builder().server(e2e::Server::Drupe).start()?;
    on_drupe(node, |node| {
        node.pull_busybox()?;
        let idle = node.run_pod("idle")?;
        idle.start_idle("c")?;
        let busy = node.run_pod("busy")?;
        busy.start("c", &["sh", "-c", "while :; do :; done"])?;
        node.run_pod("gone")?.stop()?;

        let table = prints(node, &["top", "--once"])?;
        ensure!(!table.contains('\x1b'), "no terminal: {table:?}");
        ensure!(table.starts_with("pods 2, CPU "), "{table}");
        let found = rows(&table)?;
        let [first, second] = &found[..] else {
            bail!("{table}");
        };
        let [id, name, handler, cpu, memory, overhead, start, _age] = first[..] else {
            bail!("{table}");
        };
        assert_eq!([id, name, handler], [&busy.id[..13], "e2e/busy", "microvm"]);
        // The machine is shared with whatever else it does.
        let cpu = number(cpu, "%")?;
        ensure!(cpu > 20.0 && cpu < 150.0, "{table}");
        ensure!(number(memory, "Mi")? < 64.0, "{table}");
        ensure!(number(overhead, "Mi")? > 1.0, "{table}");
        ensure!(number(start, "ms")? > 0.0, "{table}");
        assert_eq!(second[0], &idle.id[..13]);
        ensure!(number(second[3], "%")? < cpu / 2.0, "{table}");

        // The newest first, twice, and a pod that goes meanwhile is no error.
        let mut command = drupe_command(node, &["top", "-n", "2", "-d", "1", "--sort", "age"])?;
        let child = command.stdout(std::process::Stdio::piped()).spawn()?;
        idle.stop()?;
        idle.remove()?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        let tables = String::from_utf8(output.stdout)?;
        assert_eq!(tables.matches("POD ID").count(), 2, "{tables}");
        let last = &tables[tables.rfind("pods ").context("no table")?..];
        assert_eq!(rows(last)?.len(), 1, "{last}");

        let mut without_end = drupe_command(node, &["top", "-d", "1"])?;
        let mut child = without_end.stdout(std::process::Stdio::piped()).spawn()?;
        // Whoever reads the output has enough.
        drop(child.stdout.take());
        let status = eventually("the end", patient(Duration::from_secs(20)), || {
            child.try_wait()?.context("it goes on")
        })?;
        ensure!(status.success(), "{status}");
        Ok(())
    })
}

#[test]
fn without_a_daemon_top_says_so() -> Result<()> {
    let node = Node::builder().server(e2e::Server::Drupe).prepare()?;
    let output = drupe_command(&node, &["top"])?.output()?;
    fails(&output, &["no daemon answers", "systemctl start drupe"])?;
    node.finish_without_server()
}
