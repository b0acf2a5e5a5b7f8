//! kubectl, as a user of the cluster would type it.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Cluster;
use super::files::Files;
use crate::{Node, artifacts, cgroup, output};

impl Files {
    /// What kubectl prints when it succeeds.
    pub fn kubectl(&self, node: &Node, args: &[&str], input: Option<&str>) -> Result<String> {
        let output = self.try_kubectl(node, args, input)?;
        let said = output::of_success("kubectl", args, &output)?;
        Ok(said.trim_end().to_owned())
    }

    fn try_kubectl(&self, node: &Node, args: &[&str], input: Option<&str>) -> Result<Output> {
        let mut child = self.spawn_kubectl(node, args)?;
        let mut stdin = child.stdin.take().context("kubectl's input")?;
        if let Some(input) = input {
            stdin.write_all(input.as_bytes()).context("kubectl")?;
        }
        drop(stdin);
        child.wait_with_output().context("kubectl")
    }

    fn spawn_kubectl(&self, node: &Node, args: &[&str]) -> Result<Child> {
        let kubectl = artifacts::kubernetes("kubectl")?;
        let mut command = cgroup::command_in(&self.procs_file, &kubectl);
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig("admin"))
            .args(["--cache-dir", &self.dir.join("kubectl").to_string_lossy()])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        node.netns.run(|| command.spawn().context("kubectl"))
    }
}

impl Cluster {
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.files.kubectl(self.node()?, args, None)
    }

    /// `kubectl apply` of an object without a namespace.
    pub fn apply(&self, object: &Value) -> Result<String> {
        let text = object.to_string();
        self.files
            .kubectl(self.node()?, &["apply", "-f", "-"], Some(&text))
    }

    /// A namespace for one test, its default service account made.
    pub fn namespace(&self, name: &str) -> Result<Namespace<'_>> {
        self.kubectl(&["create", "namespace", name])?;
        let namespace = Namespace {
            cluster: self,
            name: name.to_owned(),
        };
        namespace.kubectl(&[
            "wait",
            "--for=create",
            "--timeout=60s",
            "serviceaccount/default",
        ])?;
        Ok(namespace)
    }

    /// One that [`Cluster::namespace`] has made.
    #[must_use]
    pub fn existing_namespace(&self, name: &str) -> Namespace<'_> {
        Namespace {
            cluster: self,
            name: name.to_owned(),
        }
    }
}

/// Where one test works.
pub struct Namespace<'a> {
    cluster: &'a Cluster,
    pub name: String,
}

impl Namespace<'_> {
    /// Has it deleted with all that is in it, and does not wait for that.
    pub fn delete(self) -> Result<()> {
        self.cluster
            .kubectl(&["delete", "namespace", &self.name, "--wait=false"])?;
        Ok(())
    }

    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        self.cluster
    }

    pub fn node(&self) -> Result<&Node> {
        self.cluster.node()
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&self.with_name(args))
    }

    /// Whatever it prints and however it ends.
    pub fn try_kubectl(&self, args: &[&str], input: Option<&str>) -> Result<Output> {
        let files = &self.cluster.files;
        files.try_kubectl(self.cluster.node()?, &self.with_name(args), input)
    }

    /// kubectl that runs on: its standard streams are pipes.
    pub fn spawn_kubectl(&self, args: &[&str]) -> Result<Child> {
        let files = &self.cluster.files;
        files.spawn_kubectl(self.cluster.node()?, &self.with_name(args))
    }

    /// What kubectl prints on a terminal of its own.
    pub fn kubectl_in_terminal(&self, args: &[&str]) -> Result<String> {
        let files = &self.cluster.files;
        let kubectl = artifacts::kubernetes("kubectl")?;
        let config = files.kubeconfig("admin");
        let quoted = |word: &&str| format!("'{word}'");
        let words: Vec<_> = self.with_name(args).iter().map(quoted).collect();
        let line = format!(
            "{} --kubeconfig {} {}",
            kubectl.display(),
            config.display(),
            words.join(" ")
        );
        let mut command = Command::new("script");
        command
            .args(["-qec", &line, "/dev/null"])
            .stdin(Stdio::null());
        let output = self.in_node(|| command.output().context("script"))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{line}: {}: {said}", output.status);
        Ok(said)
    }

    /// Runs `work` in the node's network.
    pub fn in_node<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.cluster.node()?.netns.run(work)
    }

    fn with_name<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [&["--namespace", self.name.as_str()], args].concat()
    }

    /// `kubectl apply` of one object or a list of them.
    pub fn apply(&self, object: &Value) -> Result<String> {
        let node = self.cluster.node()?;
        let args = self.with_name(&["apply", "-f", "-"]);
        let text = object.to_string();
        self.cluster.files.kubectl(node, &args, Some(&text))
    }

    /// As [`Namespace::apply`], for what is not there.
    pub fn create(&self, object: &Value) -> Result<String> {
        let node = self.cluster.node()?;
        let args = self.with_name(&["create", "-f", "-"]);
        let text = object.to_string();
        self.cluster.files.kubectl(node, &args, Some(&text))
    }

    /// Waits as `kubectl wait` does.
    pub fn wait(&self, what: &str, condition: &str) -> Result<()> {
        let condition = format!("--for={condition}");
        self.waited(what, &["wait", what, &condition, "--timeout=120s"])
    }

    /// Waits until all pods of a controller are those of its template, and
    /// ready.
    pub fn roll_out(&self, what: &str) -> Result<()> {
        self.waited(what, &["rollout", "status", what, "--timeout=120s"])
    }

    fn waited(&self, what: &str, args: &[&str]) -> Result<()> {
        if let Err(error) = self.kubectl(args) {
            let told = self.kubectl(&["describe", what]).unwrap_or_default();
            let events = self.kubectl(&["get", "events"]).unwrap_or_default();
            return Err(error.context(format!("{told}\n{events}")));
        }
        Ok(())
    }

    /// One field of an object, by JSONPath.
    pub fn field(&self, what: &str, path: &str) -> Result<String> {
        self.kubectl(&["get", what, "-o", &format!("jsonpath={path}")])
    }
}
