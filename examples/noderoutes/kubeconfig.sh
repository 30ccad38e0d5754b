#!/bin/sh
# Writes a kubeconfig for berth's node routes, once rbac.yaml is applied:
#     (umask 077; kubeconfig.sh > /etc/berth/kubeconfig)
set -eu
server=$(kubectl config view --minify --output 'jsonpath={.clusters[0].cluster.server}')
secret() { kubectl --namespace kube-system get secret berth-node-routes --output "jsonpath={.data.$1}"; }
cat <<END
apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: "$server", certificate-authority-data: "$(secret 'ca\.crt')"}}]
users: [{name: berth-node-routes, user: {token: "$(secret token | base64 -d)"}}]
contexts: [{name: cluster, context: {cluster: cluster, user: berth-node-routes}}]
current-context: cluster
END
