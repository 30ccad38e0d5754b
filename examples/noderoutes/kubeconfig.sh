#!/bin/sh
# Writes a kubeconfig for berth's node routes, once rbac.yaml is applied:
#     (umask 077; kubeconfig.sh > /etc/berth/kubeconfig)
set -eu
server=$(kubectl config view --minify --output 'jsonpath={.clusters[0].cluster.server}')
# Kubernetes fills the Secret a moment after rbac.yaml is applied.
kubectl --namespace kube-system wait secret/berth-node-routes --for 'jsonpath={.data.token}' --timeout 1m > /dev/null
ca=$(kubectl --namespace kube-system get secret berth-node-routes --output 'jsonpath={.data.ca\.crt}')
token=$(kubectl --namespace kube-system get secret berth-node-routes --output 'jsonpath={.data.token}' | base64 -d)
cat <<END
apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: "$server", certificate-authority-data: "$ca"}}]
users: [{name: berth-node-routes, user: {token: "$token"}}]
contexts: [{name: cluster, context: {cluster: cluster, user: berth-node-routes}}]
current-context: cluster
END
